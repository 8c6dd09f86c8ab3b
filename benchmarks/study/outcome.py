"""What the rows of runs.csv say: top-1, paired differences, ranks and times."""

from fractions import Fraction
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study import tasks
from benchmarks.study.names import COMPARED, NAMES
from benchmarks.study.plan import Row, by_key, images
from xmixup_jax.report.tables import BASELINE, half_interval, time_ratio, training_seconds

Seeds = dict[int, float]


class Study:
    """The rows of one scale and one number of images a class.

    `rows` are those of runs that did not fail, `found` all of them.
    """

    def __init__(self, rows: list[Row], scale: str, shots: int):
        self.scale, self.shots = scale, shots
        rows = [row for row in rows if (row['scale'], row['shots']) == (scale, shots)]
        self.found = by_key(rows)
        self.rows = [row for row in rows if not row['error']]

    def select(self, *parts: str, **values: Any) -> list[Row]:
        """The rows of these parts that have these values in their columns."""
        return [
            row
            for row in self.rows
            if row['part'] in parts and all(row[key] == value for key, value in values.items())
        ]

    def top1(self, task: str, name: str, part: str = 'main', option: str = '') -> Seeds:
        """Top-1 in % by seed; empty if there are no such runs."""
        return percent(self.select(part, task=task, name=name, option=option))

    def with_norm(self, name: str, norm: str) -> dict[str, Seeds]:
        """Top-1 in % by task and seed with a choice of batch norm, where there are runs."""
        found = {
            task: percent(self.select('main', 'batch_norm', task=task, name=name, batch_norm=norm))
            for task in self.tasks('main', 'batch_norm')
        }
        return {task: top1 for task, top1 in found.items() if top1}

    def names(self, part: str = 'main') -> list[str]:
        """The names that have been run, in order of priority."""
        present = {row['name'] for row in self.select(part)}
        return [name for name in NAMES if name in present]

    def tasks(self, *parts: str) -> list[str]:
        present = {row['task'] for row in self.select(*(parts or ('main',)))}
        return [task for task in tasks.TASKS if task in present]

    def seeds(self, *parts: str) -> list[int]:
        return sorted({row['seed'] for row in self.select(*parts)})

    def title(self, *parts: str) -> str:
        """The scale, the images a class and the seeds, in words."""
        seeds = ', '.join(map(str, self.seeds(*parts)))
        return f'{self.scale} scale, {images(self.shots)}, seeds {seeds}'

    def whole_names(self, part: str = 'main') -> list[str]:
        """The names whose runs have all finished, as far as any name's have."""
        expected = {(row['task'], row['seed']) for row in self.select(part)}
        return [
            name
            for name in self.names(part)
            if {(row['task'], row['seed']) for row in self.select(part, name=name)} == expected
        ]

    def time_ratio(self, task: str, name: str, part: str = 'main') -> float | None:
        """Median training time relative to that of fine-tuning."""
        seconds = [
            {row['seed']: training_seconds(row) for row in self.select(part, task=task, name=each)}
            for each in (name, BASELINE)
        ]
        return time_ratio(*seconds)


def studies(rows: list[Row]) -> list[Study]:
    """A study for each scale and number of images that has rows."""
    present = {(row['scale'], row['shots']) for row in rows if not row['error']}
    return [
        Study(rows, scale, shots)
        for scale, size in tasks.SCALES.items()
        for shots in size.seeds
        if (scale, shots) in present
    ]


def percent(rows: list[Row]) -> Seeds:
    """Top-1 in % by seed."""
    return {row['seed']: 100 * row['top1'] for row in rows}


def difference(top1: Seeds, base: Seeds) -> Seeds:
    """Points by which the first is better, for the seeds that both have."""
    return {seed: top1[seed] - base[seed] for seed in sorted(top1.keys() & base.keys())}


def differences(study: Study, name: str, part: str = 'main') -> dict[str, Seeds]:
    """Differences to fine-tuning by task, for the tasks that have both."""
    found = {
        task: difference(study.top1(task, name, part), study.top1(task, BASELINE, part))
        for task in study.tasks(part)
    }
    return {task: seeds for task, seeds in found.items() if seeds}


def compared(study: Study, name: str) -> dict[str, tuple[Seeds, Seeds]]:
    """Top-1 of a variant of XMixup and of what it is compared with, by task, where both have runs.

    A name with one choice of batch norm is compared with the other's runs with that choice.
    """
    base, norms = COMPARED[name], NAMES[name].batch_norms
    found = {}
    for task in study.tasks():
        runs = study.select('main', 'batch_norm', task=task, name=base)
        runs = [
            row
            for row in runs
            if (row['batch_norm'] in norms if len(norms) == 1 else not row['option'])
        ]
        top1, base_top1 = study.top1(task, name), percent(runs)
        if top1.keys() & base_top1.keys():
            found[task] = top1, base_top1
    return found


def over_tasks(by_task: dict[str, Seeds]) -> tuple[float, float, float]:
    """The mean over tasks of values by task and seed, of the seeds that all tasks have.

    Returns:
      (mean; half its 95 % interval for these tasks and other seeds, from the means over tasks of
      each seed; half its 95 % interval for other tasks, from the means over seeds of each task),
      Student's t; NaN where there are too few values.
    """
    seeds = sorted(set.intersection(*(set(each) for each in by_task.values())))
    if not seeds:
        return np.nan, np.nan, np.nan
    table = np.array([[each[seed] for seed in seeds] for each in by_task.values()])
    return float(table.mean()), half_interval(table.mean(0)), half_interval(table.mean(1))


def accuracy(rows: list[Row]) -> Fraction:
    """The share of right answers over all these runs, exactly."""
    right = sum(round(row['top1'] * row['test_images']) for row in rows)
    return Fraction(right, sum(row['test_images'] for row in rows))


def ranks(study: Study, part: str = 'main') -> dict[str, float]:
    """The mean rank over tasks of each of `whole_names`, by `accuracy`; 1 is the best.

    Names that got equally many answers right share a rank, which a mean of floating-point numbers
    would break by its rounding.
    """
    names = study.whole_names(part)
    if not names:
        return {}
    by_task = []
    for task in study.tasks(part):
        exact = [accuracy(study.select(part, task=task, name=name)) for name in names]
        order = sorted(set(exact), reverse=True)
        by_task.append(stats.rankdata([order.index(value) for value in exact]))
    return dict(zip(names, np.mean(by_task, axis=0), strict=True))
