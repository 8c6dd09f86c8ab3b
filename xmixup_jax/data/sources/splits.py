"""Finds the split that is meant, whatever a data set calls it; divides where there are none."""

import shlex
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.sources.listing import normal
from xmixup_jax.errors import DataError

UNDIVIDED_SPLITS = ('train', 'test')
_TRAIN = ('train', 'training')
_VALIDATION = ('validation', 'val', 'valid', 'dev', 'eval')
_TEST = ('test', 'testing', 'tests', *_VALIDATION)
_GROUPS = {
    **dict.fromkeys(_TEST, _TEST),
    **dict.fromkeys(_VALIDATION, _VALIDATION),
    **dict.fromkeys(_TRAIN, _TRAIN),
}
T = TypeVar('T')


def is_usual(name: str) -> bool:
    """Whether a name is one that splits usually have.

    >>> [is_usual(name) for name in ('Train', 'valid', 'cats')]
    [True, True, False]
    """
    return _folded(name) in _GROUPS


def same_split(name: str, other: str) -> bool:
    """Whether two names differ in case or Unicode form at most."""
    return _folded(name) == _folded(other)


def kind_of_split(name: str) -> str | None:
    """What a split of this name is for.

    >>> [kind_of_split(name) for name in ('Train', 'valid', 'test', 'cats')]
    ['train', 'test', 'test', None]
    """
    return None if not is_usual(name) else 'train' if _folded(name) in _TRAIN else 'test'


def find_split(split: str, present: Iterable[T], name_of: Callable[[T], str] = str) -> T | None:
    """The one that is meant by `split`: of that name, else of a name that means the same.

    Where there is no test split, validation images serve as one.

    >>> find_split('test', ['train', 'valid']), find_split('test', ['train', 'extra'])
    ('valid', None)
    """
    by_name = {name_of(each): each for each in present}
    if split in by_name:
        return by_name[split]
    by_name = {_folded(name): each for name, each in by_name.items()}
    names = (_folded(split), *_GROUPS.get(_folded(split), ()))
    return next((by_name[name] for name in names if name in by_name), None)


def _folded(name: str) -> str:
    return normal(name).casefold()


class NoSplit(DataError):
    """A split is missing, or empty."""

    def __init__(self, what: str, advice: str):
        super().__init__(what + advice)
        self.what = what
        """The message without its advice."""


def part_name(dataset: ConfigDict, config: ConfigDict) -> str:
    """'source' or 'target', the part of the configuration that a data set is, for flags."""
    return 'source' if dataset is config.source else 'target'


def substitute(split: str, found: str, why: str = '') -> list[str]:
    """The note on a split that is taken in the place of another one; empty if it is the same.

    Args:
      split: the one that was meant.
      found: the one that is taken.
      why: '': there is none of that name.
    """
    if found == split:
        return []
    return [f'{why or f"there is no split {split!r}"}: {found!r} serves as it']


def no_split(
    where: str, split: str, present: Iterable[str], dataset: ConfigDict, config: ConfigDict
) -> NoSplit:
    """The error of a missing split, with the flags that help.

    Args:
      where: the data set, for the message.
      split: the one that is missing.
      present: the splits there are.
      dataset: config.target or config.source.
      config: of the run.
    """
    part = part_name(dataset, config)
    names = list(present)
    has = f'it has {", ".join(names)}' if names else 'it has none'
    if split == dataset.test_split and split != dataset.split:
        flag, others = f'--config.{part}.test_split', [n for n in names if n != dataset.split]
        ways = [shlex.quote(f'{flag}={name}') for name in others[:3]]
        ways.append(f'{flag}=rest with --config.{part}.sample_rate=0.8')
        if part == 'target' and names and dataset.name.startswith('folder:'):
            name = shlex.quote(f'--config.target.name=folder:{where}/{dataset.split}')
            ways.append(f'{name}, which is divided')
    else:
        ways = [shlex.quote(f'--config.{part}.split={name}') for name in names[:3]]
    advice = f': use {" or ".join(ways)}' if ways else ''
    return NoSplit(f'{where} has no split {split!r}: {has}', advice)


def part_of(split: str, count: int, label: int, share: float) -> np.ndarray:
    """Divides the images of a class where the data set itself has no splits.

    Args:
      split: 'train' or 'test'.
      count: images of the class.
      label: number of the class, the seed of the division, which is the same in every run.
      share: of the images that are the test's, rounded; one at least is trained on.

    Returns:
      the places of the split's images among the class's, ascending.
    """
    order = np.random.default_rng(label).permutation(count)
    tested = min(round(share * count), count - 1)
    return np.sort(order[:tested] if split == 'test' else order[tested:])
