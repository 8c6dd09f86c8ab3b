"""The outcome of a comparison: comparison.csv, comparison.md and comparison.png."""

import csv
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from xmixup_jax.cost import StepCost
from xmixup_jax.files import whole_file

matplotlib.use('Agg')
from matplotlib import pyplot as plt

CSV, MARKDOWN, FIGURE = 'comparison.csv', 'comparison.md', 'comparison.png'
BASELINE = 'finetune'
COLUMNS = (
    'sample_rate',
    'method',
    'seed',
    'top1',
    'loss',
    'steps',
    'seconds',
    'first_step_seconds',
    'images_per_second',
    'train_images',
    'test_images',
    'devices',
    'error',
)

Row = dict[str, Any]


def write(workdir: Path, rows: list[Row], costs: dict[str, StepCost]) -> None:
    """Writes all three.

    Args:
      workdir: of the comparison.
      rows: one for each run: its labels and its result, or 'error'.
      costs: of a step of each method, if measured.
    """
    with whole_file(workdir / CSV) as partial, partial.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', restval='')
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(workdir / MARKDOWN) as partial:
        partial.write_text(markdown(rows, costs))
    with whole_file(workdir / FIGURE) as partial:
        draw(rows).savefig(partial, format='png', dpi=150)
    plt.close('all')


def paired_difference(top1: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """Mean difference over the seeds that both have, and half its 95 % interval (Student's t).

    Returns:
      (mean, half width); NaN where there are too few seeds.
    """
    seeds = sorted(top1.keys() & baseline.keys())
    differences = np.array([top1[seed] - baseline[seed] for seed in seeds])
    if len(differences) < 2:
        return (float(differences.mean()) if len(differences) else np.nan), np.nan
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return float(differences.mean()), float(half)


def _by_method(rows: list[Row], key: str) -> dict[str, dict[int, float]]:
    """{method: {seed: value}} of the rows that have a value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            found.setdefault(row['method'], {})[row['seed']] = row[key]
    return found


def _by_rate(rows: list[Row]) -> dict[float | None, list[Row]]:
    groups: dict[float | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(row['sample_rate'], []).append(row)
    return groups


def training_seconds(row: Row) -> float | None:
    """Preparation and training without the first step, which is compilation."""
    if row.get('first_step_seconds') is None:
        return None
    return row['seconds'] - row['first_step_seconds']


def markdown(rows: list[Row], costs: dict[str, StepCost]) -> str:
    """A table for each sample rate."""
    parts = []
    for rate, group in _by_rate(rows).items():
        first = next((row for row in group if 'top1' in row), {})
        title = (
            f'{first.get("train_images", "?")} training and {first.get("test_images", "?")} test '
            f'images, {first.get("steps", "?")} steps, {first.get("devices", "?")}'
        )
        if rate is not None:
            title = f'{100 * rate:g} % of the training set: {title}'
        parts.append(f'{title}\n\n{_table(group, costs)}')
    note = (
        'Top-1 in %: mean ± standard deviation over seeds, and the mean difference to fine-tuning '
        "with the same seed ± half its 95 % interval (Student's t); **bold** where the interval "
        'leaves out 0. Time a step: median on data that is on the device, all methods in turns on '
        'the same batches. Training time: preparatory phase, input, steps, checkpoints; without '
        'compilation.\n'
    )
    return '\n'.join([*parts, note])


def _table(rows: list[Row], costs: dict[str, StepCost]) -> str:
    top1 = {
        name: {seed: 100 * value for seed, value in seeds.items()}
        for name, seeds in _by_method(rows, 'top1').items()
    }
    seconds = _by_method([row | {'time': training_seconds(row)} for row in rows], 'time')
    header = ['method', 'top-1', 'seeds', 'to fine-tuning', 'step, ms', 'step', 'training', 'memory, MiB', 'compile, s']  # noqa: E501  # fmt: skip
    lines = ['| ' + ' | '.join(header) + ' |', '|' + ' --- |' * len(header)]
    for name in dict.fromkeys(row['method'] for row in rows):
        cells = [f'`{name}`', *_accuracy_cells(top1.get(name, {}), top1.get(BASELINE, {}), name)]
        cells += _cost_cells(costs.get(name), costs.get(BASELINE))
        cells.insert(-2, _ratio(seconds.get(name, {}), seconds.get(BASELINE, {})))
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _accuracy_cells(top1: dict[int, float], baseline: dict[int, float], name: str) -> list[str]:
    if not top1:
        return ['failed', '0', '']
    values = list(top1.values())
    spread = f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
    mean, half = paired_difference(top1, baseline)
    difference = ''
    if name != BASELINE and np.isfinite(mean):
        difference = f'{mean:+.2f}' + (f' ± {half:.2f}' if np.isfinite(half) else '')
        if abs(mean) > half:
            difference = f'**{difference}**'
    return [f'{np.mean(values):.2f}{spread}', str(len(values)), difference]


def _cost_cells(cost: StepCost | None, baseline: StepCost | None) -> list[str]:
    if cost is None:
        return [''] * 4
    relative = f'{cost.step_ms / baseline.step_ms:.2f} ×' if baseline else ''
    return [
        f'{cost.step_ms:.1f}',
        relative,
        f'{cost.memory_mb:.0f}',
        f'{cost.compile_seconds:.1f}',
    ]


def _ratio(seconds: dict[int, float], baseline: dict[int, float]) -> str:
    seeds = seconds.keys() & baseline.keys()
    if not seeds:
        return ''
    ratios = [seconds[seed] / baseline[seed] for seed in seeds]
    return f'{np.mean(ratios):.2f} ×'


def draw(rows: list[Row]):
    """Left: each method's difference to fine-tuning; right: accuracy against training time."""
    groups = _by_rate(rows)
    names = list(dict.fromkeys(row['method'] for row in rows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.32 * len(names)), layout='constrained'
    )
    for i, (rate, group) in enumerate(groups.items()):
        top1 = _by_method(group, 'top1')
        seconds = _by_method([row | {'time': training_seconds(row)} for row in group], 'time')
        label = 'top-1' if rate is None else f'{100 * rate:g} %'
        colour = f'C{i}'
        places, means, halves = [], [], []
        for place, name in enumerate(names):
            if name == BASELINE or name not in top1 or BASELINE not in top1:
                continue
            mean, half = paired_difference(top1[name], top1[BASELINE])
            places.append(place + (i - (len(groups) - 1) / 2) * 0.6 / len(groups))
            means.append(100 * mean)
            halves.append(100 * half if np.isfinite(half) else 0)
        left.errorbar(means, places, xerr=halves, fmt='o', ms=4, color=colour, label=label)
        for name in names:
            if not seconds.get(name):
                continue
            x = np.mean(list(seconds[name].values()))
            y = 100 * np.mean(list(top1[name].values()))
            right.plot(x, y, 's' if name == BASELINE else 'o', ms=5, color=colour)
            right.annotate(name, (x, y), xytext=(4, 3), textcoords='offset points', fontsize=7)
    left.axvline(0, color='0.5', lw=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(axis='x', alpha=0.3)
    left.set_xlabel(f'top-1 minus that of {BASELINE}, points (95 % interval)')
    right.set_xlabel('training time without compilation, s')
    right.set_ylabel('top-1, %')
    right.grid(alpha=0.3)
    if len(groups) > 1:
        left.legend(title='training set', fontsize=8)
    return figure
