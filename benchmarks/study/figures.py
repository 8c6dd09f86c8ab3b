"""The figures of RESULTS.md: gains over fine-tuning, and what the choice of batch norm does."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.names import NAMES, NORM_NAMES
from benchmarks.study.outcome import Study, differences, over_tasks
from xmixup_jax.files import atomic_write
from xmixup_jax.report.tables import BASELINE

NORM_COLOURS = {'batch': '#c4541c', 'frozen': '#1f5fa8', 'mixed': '#7a7a7a'}


def write(folder: Path, found: list[Study]) -> None:
    """Writes differences.svg and batch_norm.svg, those that there are rows for.

    Args:
      folder: to write into.
      found: the studies, a panel each.
    """
    drawn = {'differences.svg': _differences(found), 'batch_norm.svg': _batch_norm(found)}
    for name, figure in drawn.items():
        if figure is not None:
            # Without a date or random ids equal rows give equal files.
            salt = {'svg.hashsalt': name}
            with atomic_write(folder / name) as partial, matplotlib.rc_context(salt):
                figure.savefig(partial, format='svg', metadata={'Date': None})


def _differences(found: list[Study]) -> Figure | None:
    """The gain of each name over fine-tuning: tasks as dots, their mean with its interval."""
    names = {
        study: [
            name
            for name in study.names()
            # An ablation changes one thing in another name; its table compares the two.
            if name != BASELINE and not NAMES[name].tuned_as and differences(study, name)
        ]
        for study in found
    }
    shown = [study for study in found if names[study]]
    if not shown:
        return None
    rows = max(len(names[study]) for study in shown)
    size = (1.6 + 5.2 * len(shown), 1.4 + 0.3 * rows)
    figure = Figure(figsize=size, layout='constrained')
    for axes, study in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for i, task in enumerate(study.tasks()):
            points = [
                (np.mean(list(by_task[task].values())), y)
                for y, name in enumerate(names[study])
                if task in (by_task := differences(study, name))
            ]
            if points:
                style = {'ms': 4, 'color': f'C{i}', 'alpha': 0.7, 'label': task}
                axes.plot(*zip(*points, strict=True), 'o', **style)
        for y, name in enumerate(names[study]):
            by_task = differences(study, name)
            if len(by_task) == len(study.tasks()):
                mean, half, _ = over_tasks(by_task)
                error = half if np.isfinite(half) else None
                axes.errorbar(mean, y, xerr=error, fmt='D', ms=5, capsize=4, color='black')
        axes.axvline(0, color='0.5', lw=1)
        axes.set(yticks=range(len(names[study])), yticklabels=names[study])
        axes.set(ylim=(len(names[study]) - 0.5, -0.5), title=study.title('main'))
        axes.set_xlabel('gain over fine-tuning, points of top-1')
        axes.grid(axis='x', alpha=0.3)
        axes.legend(fontsize=8)
    figure.supxlabel('black: mean over tasks, 95 % interval over seeds', fontsize=9)
    return figure


def _batch_norm(found: list[Study]) -> Figure | None:
    """Top-1 by the choice of batch norm: tasks as dots, joined for each name; their mean."""
    shown = [study for study in found if study.select('batch_norm')]
    if not shown:
        return None
    names = {study: [each for each in NORM_NAMES if each in study.names()] for study in shown}
    size = (1.0 + 1.2 * sum(map(len, names.values())), 3.8)
    figure = Figure(figsize=size, layout='constrained')
    for axes, study in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        tasks = study.tasks('main', 'batch_norm')
        for x, name in enumerate(names[study]):
            for i, (norm, colour) in enumerate(NORM_COLOURS.items()):
                means = [
                    np.mean(list(top1.values())) for top1 in study.with_norm(name, norm).values()
                ]
                place = x + 0.25 * (i - 1)
                axes.plot([place] * len(means), means, 'o', ms=3, alpha=0.5, color=colour)
                if len(means) == len(tasks):
                    axes.bar(place, np.mean(means), 0.22, alpha=0.6, color=colour)
        axes.set(xticks=range(len(names[study])), xticklabels=names[study])
        axes.set(title=study.title('main', 'batch_norm'), ylabel='top-1, %')
        axes.grid(axis='y', alpha=0.3)
        bars = [matplotlib.patches.Patch(color=colour) for colour in NORM_COLOURS.values()]
        axes.set_ylim(0, 100)  # room for the legend
        axes.legend(bars, NORM_COLOURS, title='batch norm', fontsize=8, ncols=3, loc='upper left')
    return figure
