"""The figures of RESULTS.md: differences, sample rates, learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import plan
from benchmarks.study.plan import FEW, Row
from xmixup_jax.files import whole_file
from xmixup_jax.tables import BASELINE, paired_difference

if TYPE_CHECKING:
    from benchmarks.study.tables import Study


def write(folder: Path, study: Study, curves: list[Row]) -> None:
    """Writes differences.svg, rates.svg and curves.svg, those that there are rows for."""
    drawn = {
        'differences.svg': _differences(study),
        'rates.svg': _rates(study),
        'curves.svg': _curves(curves, study),
    }
    for name, figure in drawn.items():
        if figure is not None:
            # Without date and random ids: equal rows give an equal file.
            salt = {'svg.hashsalt': name}
            with whole_file(folder / name) as partial, matplotlib.rc_context(salt):
                figure.savefig(partial, format='svg', metadata={'Date': None})


def _differences(study: Study) -> Figure | None:
    """Each method's difference to fine-tuning, by task and on average."""
    from benchmarks.study.tables import differences, over_tasks

    names = [name for name in study.names() if name != BASELINE and differences(study, name)]
    if not names:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(names)), layout='constrained')
    axes = figure.subplots()
    for i, task in enumerate(study.tasks()):
        points = [
            (np.mean(list(found[task].values())), y)
            for y, name in enumerate(names)
            if task in (found := differences(study, name))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), 'o', ms=5, color=f'C{i}', label=task, alpha=0.8)
    for y, name in enumerate(names):
        mean, half, _ = over_tasks(differences(study, name))
        error = half if np.isfinite(half) else None
        axes.errorbar(mean, y, xerr=error, fmt='|', ms=16, mew=2.5, capsize=4, color='black')
    axes.axvline(0, color='0.5', lw=1)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel(
        f'top-1 minus that of {BASELINE}, points; {FEW:.0%} of the training set '
        '(black: mean of the tasks, 95 % interval over seeds)'
    )
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def _rates(study: Study) -> Figure | None:
    """Difference to fine-tuning by sample rate, a panel for each task."""
    if not study.rates():
        return None
    rates = [FEW, *study.rates()]
    names = study.tasks()
    figure = Figure(figsize=(10, 5.5), layout='constrained')
    panels = figure.subplots(2, -(-len(names) // 2), sharex=True, squeeze=False).ravel()
    methods = [name for name in plan.IN_RATES if name != BASELINE]
    for panel, task in zip(panels, names, strict=False):
        for i, name in enumerate(methods):
            points = []
            for rate in rates:
                top1 = study.top1(task, name, 'rates', rate)
                base = study.top1(task, BASELINE, 'rates', rate)
                if top1.keys() & base.keys():
                    points.append((100 * rate, *paired_difference(top1, base)))
            if points:
                x, mean, half = np.array(points).T
                panel.errorbar(x, mean, np.nan_to_num(half), fmt='o-', ms=4, capsize=3, label=name)
                panel.lines[-1].set_color(f'C{i}')
        panel.axhline(0, color='0.5', lw=1)
        panel.set_title(task)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.supxlabel('share of the training set, %')
    figure.supylabel(f'top-1 minus that of {BASELINE}, points (95 % interval)')
    return figure


def _curves(rows: list[Row], study: Study) -> Figure | None:
    """Accuracy on the training batches and on held-out images, by step."""
    rows = [row for row in rows if row['part'] == 'curves']
    if not rows:
        return None
    names = list(dict.fromkeys(row['task'] for row in rows))
    figure = Figure(figsize=(10, 5.5), layout='constrained')
    panels = figure.subplots(2, -(-len(names) // 2), squeeze=False).ravel()
    for panel, task in zip(panels, names, strict=False):
        of_task = [row for row in rows if row['task'] == task]
        for i, name in enumerate(dict.fromkeys(row['name'] for row in of_task)):
            curve = [row for row in of_task if row['name'] == name]
            steps = [int(row['step']) for row in curve]
            panel.plot(steps, [100 * float(row['top1']) for row in curve], ':', lw=1, color=f'C{i}')
            tested = [
                (int(row['step']), 100 * float(row['test_top1']))
                for row in curve
                if row['test_top1']
            ]
            # The test at the end of a run is in runs.csv alone.
            tested += [
                (int(row['steps']), 100 * row['top1'])
                for row in study.select('curves')
                if (row['task'], row['name']) == (task, name)
            ]
            if tested:
                panel.plot(*zip(*tested, strict=True), '-', lw=1.5, color=f'C{i}', label=name)
        panel.set_title(task)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.supxlabel('step')
    figure.supylabel('top-1, %: dotted on training batches, solid on held-out images')
    return figure
