"""What the study consists of: its runs, part by part, and the tables that they are kept in."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks.study import tasks
from benchmarks.tune import GRIDS
from xmixup_jax.errors import UserError

RUNS, CURVES = 'runs.csv', 'curves.csv'
KEY = ('part', 'task', 'sample_rate', 'name', 'seed')
COLUMNS = (
    *KEY,
    'changes',
    'top1',
    'loss',
    'train_top1',
    'steps',
    'seconds',
    'first_step_seconds',
    'images_per_second',
    'train_images',
    'test_images',
    'commit',
    'error',
)
CURVE_COLUMNS = (*KEY, 'step', 'loss', 'top1', 'test_loss', 'test_top1')
NUMBERS = ('sample_rate', 'seed', *COLUMNS[COLUMNS.index('top1') : COLUMNS.index('commit')])

FEW = 0.15  # of the target's training images: where transfer matters most
STEPS = {FEW: 400, 0.3: 600, 0.5: 1000, 1.0: 2000}  # until fine-tuning fits its images
# Tested on training images that the draw left over.
HELD_OUT = ('tune', 'variants', 'length', 'curves', 'large_tune')
# With the network of tasks.LARGE.
LARGE = ('large_tune', 'large')
TUNED_ON = dict.fromkeys(tasks.TASKS, 'animals') | {'digits': 'digits'}
IN_RATES = ('finetune', 'xmixup', 'finetune_warm', 'xmixup_warm')
ABLATED = ('animals', 'household')
VARIED = ('animals', 'caltech')
LENGTHS = (STEPS[FEW], 8 * STEPS[FEW])
ABLATIONS = {
    'assignment': [{'match.assignment': kind} for kind in ('greedy', 'nearest', 'random', 'least')],
    'classes of the source for one of the target': [
        {'match.assignment': 'nearest', 'match.classes_per_target': k} for k in (3, 10)
    ],
    'images of a source class': [{'source.shots': n} for n in (5, 15, 50)],
    'alpha': [{'xmixup.alpha': value} for value in (0.1, 0.2, 0.5, 1.0, 2.0)],
    'reflection': [{'xmixup.reflect': False}],
    'label space': [{'xmixup.label_space': kind} for kind in ('separate', 'target')],
    'mixed after stage': [{'xmixup.mix_at': stage} for stage in (1, 2, 3, 4)],
}
"""Title of an ablation of `xmixup` to what it changes, one value at a time."""

VARIANTS = (
    {'warm_source': True},
    {'warm_target': True},
    {'warm_source': True, 'until': 0.67},
    {'share': 0.5},
    {'cut': True, 'alpha': 1.0},
    {'temperature': 2.0},
    {'source_label': 'translated'},
    {'source_label': 'distilled'},
    {'source_label': 'distilled', 'alpha': 1.0},
    {'source_label': 'distilled', 'warm_target': True},
    {'source_label': 'distilled', 'warm_target': True, 'alpha': 0.5},
    {'source_label': 'distilled', 'warm_target': True, 'share': 0.5},
    {'source_label': 'distilled', 'warm_target': True, 'weight': 3.0},
    {'source_label': 'translated', 'warm_target': True},
    {'warm_target': True, 'until': 0.0},
    {'source_label': 'distilled', 'warm_target': True, 'until': 0.0},
)
"""Options of `variants.METHOD` that were tried, on images held out of the training set; the last
two mix nothing: what of the gain is the mixing's?"""

WARM = {'finetune_warm': 'finetune', 'xmixup_warm': 'xmixup'}
"""The best of VARIANTS, a head that begins as a linear classifier, with and without mixing."""

Row = dict[str, Any]


class Case(NamedTuple):
    """One run; the first five fields name it."""

    part: str
    task: str
    sample_rate: float
    name: str
    seed: int
    changes: dict[str, Any]
    """Of the task's configuration, by key."""

    @property
    def key(self) -> tuple:
        return self[: len(KEY)]

    def configuration(self, images: Path) -> ConfigDict:
        """What the run is given; `images` as in `tasks.configuration`."""
        config = tasks.configuration(self.task, images, self.part in LARGE)
        config.seed = self.seed
        config.target.sample_rate = self.sample_rate
        config.steps = STEPS[self.sample_rate]
        if self.part in HELD_OUT:
            config.target.test_split = 'rest'
        if self.part == 'curves':
            config.eval_every = config.log_every
        config.update_from_flattened_dict(self.changes)
        return config


Groups = Iterator[list[Case]]


def read(path: Path) -> list[Row]:
    """The rows of runs.csv or curves.csv, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(row[key]) for key in NUMBERS if row.get(key)}
        row['seed'] = int(row['seed'])
    return rows


def key(row: Row) -> tuple:
    """Of the case that a row is of."""
    return tuple(row[column] for column in KEY)


def text(changes: dict[str, Any]) -> str:
    """`changes` as words in a name or a cell."""
    return ' '.join(f'{name}={value}' for name, value in changes.items())


def _group(part, task, rate, name, seeds, changes) -> list[Case]:
    return [Case(part, task, rate, name, seed, changes) for seed in seeds]


def tune_learning_rate(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Three learning rates of fine-tuning; all methods use the best."""
    del seeds, found
    return _tune(['finetune'], names, [])


def tune_methods(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Three values of each other method's main coefficient."""
    del seeds
    return _tune([name for name in GRIDS if name != 'finetune'], names, found)


def _tune(methods: list[str], names: list[str], found: list[Row], part: str = 'tune') -> Groups:
    for task in dict.fromkeys(TUNED_ON[name] for name in names):
        for method in methods:
            name, values = GRIDS[method]
            base = {} if method == 'finetune' else learning_rate(task, found, part)
            for value in values:
                changes = base | {'method': method, name: value}
                yield _group(part, task, FEW, text({name: value}), (0,), changes)


def learning_rate(task: str, found: list[Row], part: str = 'tune') -> dict[str, Any]:
    """The learning rate that was chosen for a task, as changes of its configuration."""
    return _best('finetune', task, found, part)


def chosen(method: str, task: str, found: list[Row], part: str = 'tune') -> dict[str, Any]:
    """A method with the coefficient and learning rate that tuning chose for the task."""
    if method in WARM:
        return chosen(WARM[method], task, found, part) | {'warm_head': True}
    best = _best(method, task, found, part)
    return learning_rate(task, found, part) | {'method': method} | best


def _best(method: str, task: str, found: list[Row], part: str) -> dict[str, Any]:
    name, values = GRIDS[method]
    top1 = {
        value: [
            -math.inf if row['error'] else row['top1']
            for row in found
            if row['part'] == part
            and row['task'] == TUNED_ON[task]
            and row['name'] == text({name: value})
        ]
        for value in values
    }
    for value, rows in top1.items():
        if not rows:
            raise UserError(
                f'{RUNS} has no run of {TUNED_ON[task]} with {name}={value} that was made for '
                'tuning: begin with --parts=tune'
            )
    return {name: max(values, key=lambda value: mean(top1[value]))}


def main(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Every method on every task, at the smallest sample rate."""
    first = ('finetune', 'xmixup', *WARM)
    for name in (*first, *(method for method in GRIDS if method not in first)):
        for task in names:
            yield _group('main', task, FEW, name, seeds, chosen(name, task, found))


def rates(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Some methods at the other sample rates, with the same coefficients."""
    for rate in STEPS:
        for method in IN_RATES if rate != FEW else ():
            for task in names:
                yield _group('rates', task, rate, method, seeds, chosen(method, task, found))


def ablation(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """`xmixup` with one thing changed at a time."""
    for variants in ABLATIONS.values():
        for changes in variants:
            for task in ABLATED:
                base = chosen('xmixup', task, found)
                if task in names and base | changes != base:
                    yield _group('ablation', task, FEW, text(changes), seeds, base | changes)


def variants(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Fine-tuning, `xmixup`, and what might be better."""
    for task in VARIED:
        cases = {method: chosen(method, task, found) for method in ('finetune', 'xmixup')}
        variant = learning_rate(task, found) | {'method': 'xmixup_variant'}
        for options in VARIANTS:
            changes = {f'xmixup_variant.{key}': value for key, value in options.items()}
            cases[text(options)] = variant | changes
        for name, changes in cases.items() if task in names else ():
            yield _group('variants', task, FEW, name, seeds, changes)


def length(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Whether the steps are too few for mixing to help, a little or much of it."""
    for steps in LENGTHS:
        for task in VARIED:
            base = chosen('xmixup', task, found)
            cases = {'finetune': chosen('finetune', task, found), 'xmixup': base}
            cases['xmixup.alpha=1.0'] = base | {'xmixup.alpha': 1.0}
            for name, changes in cases.items() if task in names else ():
                changes = changes | {'steps': steps}
                yield _group('length', task, FEW, f'{name} steps={steps}', seeds, changes)


def curves(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Learning curves, tested on the way, on training images that the draw left over."""
    for task in names:
        for method in ('finetune', 'xmixup'):
            yield _group('curves', task, FEW, method, seeds[:1], chosen(method, task, found))


def large_learning_rate(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """As `tune_learning_rate`, with the larger network."""
    del seeds, found
    return _tune(['finetune'], photographs(names), [], 'large_tune')


def large_alpha(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """As `tune_methods`, of XMixup with the larger network."""
    del seeds
    return _tune(['xmixup'], photographs(names), found, 'large_tune')


def large(names: list[str], seeds: list[int], found: list[Row]) -> Groups:
    """Some methods with a larger network."""
    for task in photographs(names):
        for method in IN_RATES:
            changes = chosen(method, task, found, 'large_tune')
            yield _group('large', task, FEW, method, seeds, changes)


def photographs(names: list[str]) -> list[str]:
    """Those of the tasks that the larger network is for."""
    return [name for name in names if name in tasks.PHOTOGRAPHS]


PARTS = {
    'tune': (tune_learning_rate, tune_methods),
    'variants': (variants,),
    'main': (main,),
    'rates': (rates,),
    'ablation': (ablation,),
    'length': (length,),
    'curves': (curves,),
    'large': (large_learning_rate, large_alpha, large),
}
"""Each part's phases, one after the other; functions of the names of tasks, the seeds and the rows
of runs.csv, to groups of cases that share their compiled steps."""
