"""The outcome of a comparison: comparison.csv, comparison.md and comparison.png."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from xmixup_jax.compute.cost import StepCost
from xmixup_jax.files import atomic_write

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

HEADER = (
    'method',
    'top-1',
    'seeds',
    'to fine-tuning',
    'step, ms',
    'step',
    'training',
    'memory, MiB',
    'compile, s',
)

NOTE = (
    'Top-1 in %: mean ± standard deviation over seeds, and the mean difference to fine-tuning '
    "with the same seed ± half its 95 % interval (Student's t); **bold** where the interval "
    'leaves out 0. Time a step: median on data that is on the device, all methods in turns on '
    'the same batches. Training time: preparatory phase, input, steps, checkpoints; without '
    'compilation.'
)

Row = dict[str, Any]


def write(workdir: Path, rows: list[Row], costs: dict[str, StepCost]) -> None:
    """Writes comparison.csv, comparison.md and comparison.png.

    Args:
      workdir: of the comparison.
      rows: one for each run: its labels and its result, or 'error'.
      costs: of a step of each method, if measured.
    """
    write_csv(workdir, rows)
    with atomic_write(workdir / MARKDOWN) as partial:
        partial.write_text(markdown(rows, costs), encoding='utf-8', errors='backslashreplace')
    figure = Figure(figsize=figure_size(rows), layout='constrained')
    draw(figure, rows)
    with atomic_write(workdir / FIGURE) as partial:
        figure.savefig(partial, format='png', dpi=150)


def write_csv(workdir: Path, rows: list[Row]) -> None:
    """Writes comparison.csv alone."""
    with (
        atomic_write(workdir / CSV) as partial,
        partial.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', restval='')
        writer.writeheader()
        writer.writerows(rows)


def paired_difference(top1: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """Mean difference over the seeds that both have, and half its 95 % interval (Student's t).

    Returns:
      (mean, half width); NaN where there are too few seeds.
    """
    seeds = sorted(top1.keys() & baseline.keys())
    differences = np.array([top1[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean()) if len(differences) else np.nan
    return mean, half_interval(differences)


def half_interval(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean of [N] values (Student's t); NaN for fewer than two."""
    if len(values) < 2:
        return np.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def by_method(rows: list[Row], key: str) -> dict[str, dict[int, float]]:
    """{method: {seed: value}} of the rows that have a value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            found.setdefault(row['method'], {})[row['seed']] = row[key]
    return found


def by_rate(rows: list[Row]) -> dict[float | None, list[Row]]:
    groups: dict[float | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(row['sample_rate'], []).append(row)
    return groups


def training_seconds(row: Row) -> float | None:
    """Preparation and training without the first step, which is compilation."""
    if row.get('first_step_seconds') is None:
        return None
    return row['seconds'] - row['first_step_seconds']


def seconds_by_method(rows: list[Row]) -> dict[str, dict[int, float]]:
    """{method: {seed: `training_seconds`}}."""
    return by_method([row | {'time': training_seconds(row)} for row in rows], 'time')


def markdown(rows: list[Row], costs: dict[str, StepCost]) -> str:
    """A table for each sample rate."""
    parts = []
    for rate, group in by_rate(rows).items():
        table = [HEADER, ['---'] * len(HEADER), *cells(group, costs)]
        lines = ['| ' + ' | '.join(line) + ' |' for line in table]
        parts.append('\n'.join([title(rate, group), '', *lines, '']))
    return '\n'.join([*parts, NOTE + '\n'])


def title(rate: float | None, rows: list[Row]) -> str:
    """What the runs with one sample rate have in common."""
    first = next((row for row in rows if 'top1' in row), {})
    words = (
        f'{first.get("train_images", "?")} training and {first.get("test_images", "?")} test '
        f'images, {first.get("steps", "?")} steps, {first.get("devices", "?")}'
    )
    return words if rate is None else f'{100 * rate:g} % of the training set: {words}'


def cells(rows: list[Row], costs: dict[str, StepCost]) -> list[list[str]]:
    """A row of the table for each method, under HEADER, in Markdown."""
    top1 = {
        name: {seed: 100 * value for seed, value in seeds.items()}
        for name, seeds in by_method(rows, 'top1').items()
    }
    seconds = seconds_by_method(rows)
    table = []
    for name in dict.fromkeys(row['method'] for row in rows):
        line = [f'`{name}`', *_accuracy_cells(top1.get(name, {}), top1.get(BASELINE, {}), name)]
        line += _cost_cells(costs.get(name), costs.get(BASELINE))
        ratio = time_ratio(seconds.get(name, {}), seconds.get(BASELINE, {}))
        line.insert(-2, '' if ratio is None else f'{ratio:.2f} ×')
        table.append(line)
    return table


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


def time_ratio(seconds: dict[int, float], baseline: dict[int, float]) -> float | None:
    """Median over the seeds that both have: the first run of all also decodes the images."""
    ratios = [seconds[seed] / baseline[seed] for seed in seconds.keys() & baseline.keys()]
    return float(np.median(ratios)) if ratios else None


def figure_size(rows: list[Row]) -> tuple[float, float]:
    """Width and height of what `draw` draws, inches."""
    return 11.0, 1.4 + 0.3 * len({row['method'] for row in rows})


def draw(figure: Figure, rows: list[Row]) -> None:
    """For each method: top-1 of every run, difference to fine-tuning, relative training time."""
    groups = by_rate(rows)
    names = list(dict.fromkeys(row['method'] for row in rows))
    axes = figure.subplots(1, 3, sharey=True)
    for i, (rate, group) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * 0.7 / len(groups)
        _draw_rate(axes, group, names, offset, f'C{i}', None if rate is None else f'{rate:.0%}')
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes[0].set_xlabel('top-1, % (line: mean)')
    axes[1].set_xlabel(f'difference to {BASELINE}, points (95 % interval)')
    axes[1].axvline(0, color='0.5', lw=1)
    axes[2].set_xlabel(f'training time, multiple of {BASELINE}')
    axes[2].axvline(1, color='0.5', lw=1)
    for axis in axes:
        axis.grid(axis='x', alpha=0.3)
        axis.tick_params(axis='y', length=0)
    if len(groups) > 1:
        axes[0].legend(title='training set', fontsize=8)


def _draw_rate(axes, rows, names, offset, colour, label) -> None:
    top1 = by_method(rows, 'top1')
    seconds = seconds_by_method(rows)
    for place, name in enumerate(names):
        y = place + offset
        values = [100 * value for value in top1.get(name, {}).values()]
        if not values:
            continue
        axes[0].plot(values, [y] * len(values), 'o', ms=3, alpha=0.5, color=colour)
        axes[0].plot(np.mean(values), y, '|', ms=11, mew=2, color=colour, label=label)
        label = None  # one entry of the legend for each sample rate
        mean, half = paired_difference(top1[name], top1.get(BASELINE, {}))
        if name != BASELINE and np.isfinite(mean):
            error = 100 * half if np.isfinite(half) else 0.0
            axes[1].errorbar(100 * mean, y, xerr=error, fmt='o', ms=4, color=colour)
        ratio = time_ratio(seconds.get(name, {}), seconds.get(BASELINE, {}))
        if ratio is not None:
            axes[2].plot([1, ratio], [y, y], '-', lw=2, color=colour)
            axes[2].plot(ratio, y, 'o', ms=4, color=colour)
