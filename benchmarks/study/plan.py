"""What the study consists of: its runs, phase by phase, and the table that they are kept in."""

import csv
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks.study import tasks
from benchmarks.study.names import (
    BATCH_NORMS,
    COMBINATIONS,
    NAMES,
    NORM_NAMES,
    PROBE,
    RATE_NAMES,
    Changes,
)
from benchmarks.study.tasks import ALL, FEW, LITE0, LITE2, SCALES
from xmixup_jax.errors import UserError
from xmixup_jax.methods import METHODS

RUNS = 'runs.csv'
KEY = ('scale', 'part', 'task', 'shots', 'name', 'option', 'seed')
COLUMNS = (
    *KEY,
    'changes',
    'batch_norm',
    'learning_rate',
    'top1',
    'loss',
    'train_top1',
    'steps',
    'seconds',
    'first_step_seconds',
    'images_per_second',
    'train_images',
    'test_images',
    'device',
    'commit',
    'error',
)
INTEGERS = ('shots', 'seed', 'steps', 'train_images', 'test_images')
NUMBERS = (
    'learning_rate',
    'top1',
    'loss',
    'train_top1',
    'seconds',
    'first_step_seconds',
    'images_per_second',
)

PARTS = ('tune', 'main', 'batch_norm', 'rates', 'combine', 'lite2_tune', 'lite2')
# Tested on training images that the draw left over; the others are tested on the test images.
HELD_OUT = ('tune', 'combine', 'lite2_tune')
NETWORKS = {'lite2_tune': LITE2, 'lite2': LITE2}  # the other parts: LITE0
LITE2_TASKS = ('cub100', 'scene15')
LITE2_NAMES = (PROBE, 'finetune', 'xmixup', 'finetune_warm', 'xmixup_warm')

Row = dict[str, Any]
Found = dict[tuple, Row]
"""The rows of runs.csv by `key`."""


class Case(NamedTuple):
    """One run; the first seven fields identify it."""

    scale: str
    part: str
    task: str
    shots: int
    """Training images of each class; 0: all."""
    name: str
    option: str
    """What distinguishes runs of one name within a part, in words."""
    seed: int
    changes: Changes

    @property
    def key(self) -> tuple:
        return self[: len(KEY)]

    def configuration(self, data: Path, cache: Path) -> ConfigDict:
        """The run's configuration; see `tasks.configuration`."""
        network = NETWORKS.get(self.part, LITE0)
        config = tasks.configuration(self.task, self.scale, self.shots, network, data, cache)
        config.seed = self.seed
        if self.part in HELD_OUT:
            config.target.test_split = 'rest'
            if self.shots == ALL:
                config.target.sample_rate = tasks.TUNING_RATE
        config.update_from_flattened_dict(self.changes)
        return config


Group = list[Case]
"""Cases that share their compiled steps: they differ in seed, learning rate and coefficient alone,
see `step.make_task`."""
Phase = Callable[[Found], Iterator[Group]]
"""From what has been run to the groups that follow from it. Raises NotTuned while runs that it
depends on are missing."""


class NotTuned(UserError):
    """A tuning run is missing."""


class Wanted(NamedTuple):
    """The part of the study that is to be run."""

    scale: str
    parts: tuple[str, ...] = PARTS
    tasks: tuple[str, ...] = tasks.TASKS
    shots: tuple[int, ...] = (FEW, ALL)
    names: tuple[str, ...] = tuple(NAMES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def of(self, shots: int) -> tuple[list[str], list[int]]:
        """The tasks, and the seeds for so many images of a class."""
        scale = SCALES[self.scale]
        seeds = [seed for seed in self.seeds if seed < scale.seeds[shots]]
        return [task for task in self.tasks if task in scale.tasks], seeds


class Choice(NamedTuple):
    """Where tuning looks: the rows of one task, one number of images, one part."""

    scale: str
    task: str
    shots: int
    part: str = 'tune'

    @property
    def tuned_on(self) -> str:
        """The task whose held-out images choose for this one."""
        return SCALES[self.scale].tuned_on.get(self.task, self.task)

    def group(self, name: str, option: Changes) -> Group:
        """A tuning run."""
        changes = _fixed(name) | option
        key = (self.scale, self.part, self.task, self.shots, name, text(option), 0)
        return [Case(*key, changes)]

    def top1(self, name: str, option: Changes, found: Found) -> float:
        """Held-out top-1 with an option; -inf if the run diverged.

        Raises:
          NotTuned: there is no such row.
        """
        wanted = (self.scale, self.part, self.tuned_on, self.shots, name, text(option), 0)
        if wanted in found:
            row = found[wanted]
            return -math.inf if row['error'] else row['top1']
        raise NotTuned(
            f'{RUNS} has no run of {name} on {self.tuned_on} ({images(self.shots)}, '
            f'{self.scale}) with {text(option)}: begin with --parts={self.part} --names={name}'
        )

    def best(self, name: str, options: list[Changes], found: Found) -> Changes:
        """The option with the highest held-out top-1; the first of several."""
        return max(options, key=lambda option: self.top1(name, option, found))


def read(path: Path) -> list[Row]:
    """The rows of runs.csv, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {column: int(row[column]) for column in INTEGERS if row[column]}
        row |= {column: float(row[column]) for column in NUMBERS if row[column]}
    return rows


def key(row: Row) -> tuple:
    """The key of a row's case."""
    return tuple(row[column] for column in KEY)


def by_key(rows: list[Row]) -> Found:
    return {key(row): row for row in rows}


def text(changes: Changes) -> str:
    """`changes` in words, for a name or a cell."""
    return ' '.join(f'{name}={value}' for name, value in changes.items())


def images(shots: int) -> str:
    """Images of a class in words."""
    return f'{shots} images a class' if shots else 'all images'


def phases(wanted: Wanted) -> Iterator[Phase]:
    """The phases of the study in order of priority.

    Name by name over all tasks and seeds, so that a study that is cut off has whole rows.
    """
    for shots in (each for each in SCALES[wanted.scale].seeds if each in wanted.shots):
        names, seeds = wanted.of(shots)
        choices = [Choice(wanted.scale, task, shots) for task in names]
        for name in wanted.names:
            if 'tune' in wanted.parts:
                yield from _tuning(name, wanted.scale, choices)
            if 'main' in wanted.parts:
                yield from _phase_of_each(choices, _main, 'main', name, seeds)
            if 'batch_norm' in wanted.parts and name in NORM_NAMES:
                yield from _phase_of_each(choices, _batch_norm, name, seeds)
            if 'rates' in wanted.parts and name in RATE_NAMES:
                yield from _phase_of_each(choices, _rates, name, seeds)
        if 'combine' in wanted.parts and shots == FEW:
            yield from _phase_of_each(choices, _combine, seeds)
        if SCALES[wanted.scale].needs_gpu and shots == FEW:
            lite2 = [each._replace(part='lite2_tune') for each in choices]
            lite2 = [each for each in lite2 if each.task in LITE2_TASKS]
            for name in (each for each in LITE2_NAMES if each in wanted.names):
                if 'lite2_tune' in wanted.parts:
                    yield from _tuning(name, wanted.scale, lite2)
                if 'lite2' in wanted.parts:
                    yield from _phase_of_each(lite2, _main, 'lite2', name, seeds)


def _phase_of_each(choices: list[Choice], function, *arguments) -> Iterator[Phase]:
    for choice in choices:
        yield partial(function, *arguments, choice)


def _fixed(name: str) -> Changes:
    """The options that every run of a name has, unless tuning changes them."""
    changes, coefficient = NAMES[name].changes, NAMES[name].coefficient
    return changes | ({coefficient[0]: coefficient[1][0]} if coefficient else {})


def _tuning(name: str, scale: str, choices: list[Choice]) -> Iterator[Phase]:
    if name == PROBE or NAMES[name].tuned_as:
        return
    for stage in range(len(stages(name, scale))):
        own = [choice for choice in choices if choice.tuned_on == choice.task]
        yield from _phase_of_each(own, _tuning_stage, name, scale, stage)


def _tuning_stage(name, scale: str, stage: int, choice: Choice, found: Found) -> Iterator[Group]:
    best: Changes = {}
    for options in stages(name, scale)[:stage]:
        best = choice.best(name, options(best), found)
    # The best one so far has been run by an earlier stage.
    options = [each for each in stages(name, scale)[stage](best) if each != best]
    for _, same in itertools.groupby(options, partial(_program, name)):
        yield [case for option in same for case in choice.group(name, option)]


def stages(name: str, scale: str) -> list[Callable[[Changes], list[Changes]]]:
    """How a name is tuned: functions from the best option so far to the options to try.

    First the learning rate with each choice of batch norm; then, at the full scale, the main
    coefficient. The second lists its argument too.
    """
    size, (_, coefficient, _, norms) = SCALES[scale], NAMES[name]
    rates = [_rate(rate, norm) for norm in norms for rate in size.learning_rates[norm]]
    found: list[Callable[[Changes], list[Changes]]] = [lambda best: rates]
    if size.tunes_further and coefficient:
        key, values = coefficient
        found.append(lambda best: [best, *(best | {key: value} for value in values[1:])])
    return found


def _program(name: str, option: Changes) -> Changes:
    """The part of an option that a compiled step depends on."""
    method = NAMES[name].changes['method']
    traced = {f'{method}.{key}' for key, each in METHODS[method].options.items() if each.traced}
    return {k: v for k, v in option.items() if k not in traced | {'optimizer.learning_rate'}}


def _rate(rate: float, norm: str) -> Changes:
    return {'optimizer.learning_rate': rate, 'batch_norm': norm}


def chosen_option(name: str, choice: Choice, found: Found) -> Changes:
    """What tuning chose for a name.

    Raises:
      UserError: it has not been tuned yet.
    """
    entry = NAMES[name]
    if entry.tuned_as and len(entry.batch_norms) == 1:
        return with_norm(entry.tuned_as, entry.batch_norms[0], choice, found)
    name = entry.tuned_as or name
    best: Changes = {}
    for options in stages(name, choice.scale) if name != PROBE else ():
        best = choice.best(name, options(best), found)
    return best


def with_norm(name: str, norm: str, choice: Choice, found: Found) -> Changes:
    """The best option with this choice of batch norm: `mixed` has the chosen learning rate."""
    best = chosen_option(name, choice, found)
    if norm in (best['batch_norm'], 'mixed'):
        return best | {'batch_norm': norm}
    rates = [_rate(rate, norm) for rate in SCALES[choice.scale].learning_rates[norm]]
    return choice.best(name, rates, found)


def _group(part, choice: Choice, name, option: str, seeds: list[int], changes: Changes) -> Group:
    key = (choice.scale, part, choice.task, choice.shots, name, option)
    return [Case(*key, seed, changes) for seed in seeds]


def _main(part, name, seeds: list[int], choice: Choice, found: Found) -> Iterator[Group]:
    """A name as tuned, tested on the test images."""
    changes = _fixed(name) | chosen_option(name, choice, found)
    yield _group(part, choice, name, '', seeds, changes)


def _batch_norm(name, seeds: list[int], choice: Choice, found: Found) -> Iterator[Group]:
    """A name with the choices of batch norm that `main` does not have, each at its own rate."""
    chosen = chosen_option(name, choice, found)
    further = ('mixed',) if SCALES[choice.scale].tunes_further else ()
    for norm in (*BATCH_NORMS, *further):
        option = with_norm(name, norm, choice, found)
        if option != chosen:
            changes = _fixed(name) | option
            label = text({'batch_norm': norm})
            yield _group('batch_norm', choice, name, label, seeds, changes)


def _rates(name, seeds: list[int], choice: Choice, found: Found) -> Iterator[Group]:
    """A name with frozen statistics at the learning rates that it did not choose, so that names can
    be compared at the same rate."""
    chosen = with_norm(name, 'frozen', choice, found)
    for rate in SCALES[choice.scale].learning_rates['frozen']:
        if rate != chosen['optimizer.learning_rate']:
            changes = _fixed(name) | chosen | _rate(rate, 'frozen')
            label = text({'optimizer.learning_rate': rate})
            yield _group('rates', choice, name, label, seeds, changes)


def _combine(seeds: list[int], choice: Choice, found: Found) -> Iterator[Group]:
    """Combinations for the best network with few images, on images that are held out."""
    yield _group('combine', choice, PROBE, '', seeds, _fixed(PROBE))
    for name, combinations in COMBINATIONS.items():
        base = _fixed(name) | with_norm(name, 'frozen', choice, found)
        for option, changes in combinations.items():
            yield _group('combine', choice, name, option, seeds, base | changes)
