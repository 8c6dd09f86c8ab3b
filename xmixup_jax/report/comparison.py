"""report.html of a comparison, and the page that compares two runs."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.cost import StepCost
from xmixup_jax.config import changes
from xmixup_jax.data.selection import Opened
from xmixup_jax.data.sources import short_name
from xmixup_jax.errors import UserError
from xmixup_jax.files import REPORT
from xmixup_jax.report import figures, tables
from xmixup_jax.report.page import figure_tag, write
from xmixup_jax.report.predictions import Finished, where_they_differ

log = logging.getLogger('xmixup_jax')

_OTHERS = 3  # methods whose differences to the baseline are shown; 1 with several sample rates


def write_report(
    workdir: Path,
    config: ConfigDict,
    rows: list[tables.Row],
    folders: list[str],
    costs: dict[str, StepCost],
    configs: Sequence[ConfigDict] = (),
) -> None:
    """Writes report.html.

    Args:
      workdir: of the comparison.
      config: of the first run.
      rows: one for each run, see `tables.write`.
      folders: of the same runs, within workdir.
      costs: of a step of each method, if measured.
      configs: of the same runs, to show where the methods differ; some images are read. Without
        them, that section is left out.
    """
    groups = tables.by_rate(rows)
    finished = [
        (row, Finished(workdir / folder, each))
        for row, folder, each in zip(rows, folders, configs, strict=bool(configs))
        if 'top1' in row
    ]
    write(
        workdir / REPORT,
        'comparison.html',
        title=f'{short_name(config.target.name)} · {len({r["method"] for r in rows})} methods',
        pixelated=config.resize < 64,
        sentence=' '.join(sentence(rate, group) for rate, group in groups.items()),
        header=tables.HEADER,
        note=tables.NOTE.replace('*', ''),
        groups=[
            {
                'title': tables.title(rate, group),
                'plot': _trade_off(group),
                'table': tables.cells(group, costs),
            }
            for rate, group in groups.items()
        ],
        differences=_differences(finished),
        figure=figure_tag(
            figures.svg(lambda figure: tables.draw(figure, rows), *tables.figure_size(rows)),
            'For each method: top-1 of every run, difference to fine-tuning, training time.',
        ),
        runs=[_run(workdir, row, folder) for row, folder in zip(rows, folders, strict=True)],
        config=json.dumps(config.to_dict(), indent=2),
    )


def write_pair(
    output: Path, first: Finished, second: Finished, names: tuple[str, str], opened: Opened
) -> dict[str, Any]:
    """Writes the page that compares two runs.

    Args:
      output: the file.
      first, second: runs with the same test images.
      names: what to call them.
      opened: data sets that have been opened; extended.

    Returns:
      the values of the macro in differences.html.

    Raises:
      DataError: the data cannot be opened, or a run's predictions cannot be read.
    """
    part = where_they_differ({0: first}, {0: second}, names, opened)
    differing = changes(first.config, second.config)
    write(
        output,
        'pair.html',
        title=f'{names[1]} against {names[0]}',
        sentence=pair_sentence(part),
        key_facts=[],
        contents=[('differences', 'Where they differ'), ('configuration', 'Configuration')],
        pixelated=second.config.resize < 64,
        part=part,
        changes=[(f'config.{key}', [*map(_value, values)]) for key, values in differing.items()],
    )
    return part


def pair_sentence(part: dict[str, Any]) -> str:
    """The comparison of two runs in one line.

    Args:
      part: the values of the macro in differences.html.
    """
    (only,), (first, second) = part['seeds'], part['methods']
    both, a, b, neither = only['counts']
    images = both + a + b + neither
    return (
        f'{first} {100 * (both + a) / images:.2f} %, {second} {100 * (both + b) / images:.2f} % '
        f'top-1 on {images} test images; {a} are correct only with {first}, {b} only with {second} '
        f"(McNemar's test: p = {only['p']})"
    )


def _value(value: Any) -> str:
    return '' if value is None else str(value)


def _differences(runs: Sequence[tuple[tables.Row, Finished]]) -> list[dict[str, Any]]:
    """A part for each method that is compared with the baseline, at each sample rate.

    Args:
      runs: those that are finished.
    """
    groups: dict[float | None, dict[str, dict[int, Finished]]] = {}
    for row, run in runs:
        methods = groups.setdefault(row['sample_rate'], {})
        methods.setdefault(row['method'], {})[row['seed']] = run
    opened: Opened = {}
    parts = []
    for rate, methods in groups.items():
        rows = [row for row, _ in runs if row['sample_rate'] == rate]
        baseline, others = _compared(tables.by_method(rows, 'top1'))
        where = '' if rate is None else f', {100 * rate:g} % of the training set'
        for name in others[: _OTHERS if len(groups) == 1 else 1]:
            try:
                part = where_they_differ(methods[baseline], methods[name], (baseline, name), opened)
            except UserError as error:
                log.warning('no differences of %s and %s: %s', baseline, name, error)
                continue
            parts.append(part | {'title': f'{name} against {baseline}{where}'})
    return parts


def _compared(top1: dict[str, dict[int, float]]) -> tuple[str, list[str]]:
    """The baseline, and the methods that have seeds in common with it: XMixup, then the best."""
    baseline = tables.BASELINE if tables.BASELINE in top1 else next(iter(top1))
    gains = {
        name: tables.paired_difference(values, top1[baseline])[0]
        for name, values in top1.items()
        if name != baseline and values.keys() & top1[baseline].keys()
    }
    return baseline, sorted(gains, key=lambda name: (name != 'xmixup', -gains[name]))


def sentence(rate: float | None, rows: list[tables.Row]) -> str:
    """What XMixup, or else the first other method, gains on fine-tuning, in one line."""
    top1 = tables.by_method(rows, 'top1')
    others = [name for name in top1 if name != tables.BASELINE]
    if tables.BASELINE not in top1 or not others:
        return f'{", ".join(top1)}: nothing to compare.'
    name = 'xmixup' if 'xmixup' in others else others[0]
    mean, half = tables.paired_difference(top1[name], top1[tables.BASELINE])
    seeds = len(top1[name].keys() & top1[tables.BASELINE].keys())
    with_rate = '' if rate is None else f'{100 * rate:g} % of the training set: '
    if np.isnan(half):
        return f'{with_rate}{name} against fine-tuning: {100 * mean:+.2f} points, {seeds} seed.'
    verdict = 'significant' if abs(mean) > half else 'not significant'
    return (
        f'{with_rate}{name} against fine-tuning: {100 * mean:+.2f} ± {100 * half:.2f} points '
        f'top-1, {seeds} seeds, 95 % interval, {verdict}.'
    )


def _trade_off(rows: list[tables.Row]) -> Any:
    top1 = tables.by_method(rows, 'top1')
    seconds = tables.seconds_by_method(rows)
    points = {}
    for name, values in top1.items():
        ratio = tables.time_ratio(seconds.get(name, {}), seconds.get(tables.BASELINE, {}))
        if ratio is not None:
            percent = 100 * np.array(list(values.values()))
            points[name] = (ratio, percent.mean(), percent.std(ddof=1) if len(percent) > 1 else 0.0)
    if not points:
        return ''
    words = '; '.join(
        f'{name} {top1:.2f} % at {time:.2f} times' for name, (time, top1, _) in points.items()
    )
    return figure_tag(
        figures.trade_off(points, tables.BASELINE),
        f'Top-1 accuracy against training time, a multiple of fine-tuning: {words}.',
    )


def _run(workdir: Path, row: tables.Row, folder: str) -> dict[str, Any]:
    rate = row['sample_rate']
    return {
        'method': row['method'],
        'seed': row['seed'],
        'rate': '' if rate is None else f'{rate:.0%}',
        'top1': f'{100 * row["top1"]:.2f}' if 'top1' in row else row.get('error', ''),
        'link': quote(f'{folder}/{REPORT}') if (workdir / folder / REPORT).exists() else '',
    }
