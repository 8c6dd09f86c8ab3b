"""report.html of a comparison."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.cost import StepCost
from xmixup_jax.files import REPORT
from xmixup_jax.report import figures, tables
from xmixup_jax.report.page import figure_tag, write


def write_report(
    workdir: Path,
    config: ConfigDict,
    rows: list[tables.Row],
    folders: list[str],
    costs: dict[str, StepCost],
) -> None:
    """Writes report.html.

    Args:
      workdir: of the comparison.
      config: of the first run.
      rows: one for each run, see `tables.write`.
      folders: of the same runs, within workdir.
      costs: of a step of each method, if measured.
    """
    groups = tables.by_rate(rows)
    write(
        workdir / REPORT,
        'comparison.html',
        title=f'{config.target.name.split("/")[-1]} · {len({r["method"] for r in rows})} methods',
        pixelated=False,
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
        figure=figure_tag(
            figures.svg(lambda figure: tables.draw(figure, rows), *tables.figure_size(rows)),
            'For each method: top-1 of every run, difference to fine-tuning, training time.',
        ),
        runs=[_run(workdir, row, folder) for row, folder in zip(rows, folders, strict=True)],
        config=json.dumps(config.to_dict(), indent=2),
    )


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
