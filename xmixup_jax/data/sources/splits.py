"""Finds splits by their usual names, and splits data sets that have none."""

import shlex
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.sources.listing import nfc
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


def is_split_name(name: str) -> bool:
    """Whether a name is a usual name of a split.

    >>> [is_split_name(name) for name in ('Train', 'valid', 'cats')]
    [True, True, False]
    """
    return _folded(name) in _GROUPS


def same_split(name: str, other: str) -> bool:
    """Whether two names are equal up to case and Unicode form."""
    return _folded(name) == _folded(other)


def kind_of_split(name: str) -> str | None:
    """Says what a split of this name is for: 'train', or 'test' (also for validation splits).

    >>> [kind_of_split(name) for name in ('Train', 'valid', 'test', 'cats')]
    ['train', 'test', 'test', None]
    """
    return None if not is_split_name(name) else 'train' if _folded(name) in _TRAIN else 'test'


def find_split(split: str, present: Iterable[T], name_of: Callable[[T], str] = str) -> T | None:
    """Finds the split called `split`, or one whose name means the same.

    If there is no test split, a validation split serves as one.

    Args:
      split: name of the split.
      present: the splits to choose from.
      name_of: returns the name of one of them.

    Returns:
      the split; None if there is none.

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
    return nfc(name).casefold()


class NoSplit(DataError):
    """A split is missing, or empty."""

    def __init__(self, what: str, advice: str):
        super().__init__(what + advice)
        self.what = what
        """The message without the advice."""


def part_name(dataset: ConfigDict, config: ConfigDict) -> str:
    """Returns 'source' or 'target', the part of the configuration of a data set, for flags.

    The target of a pre-training, whose configuration lacks `pretrain`, is the user's source.
    """
    return 'source' if dataset is config.source or 'pretrain' not in config else 'target'


def substitution_note(split: str, found: str, why: str = '') -> list[str]:
    """Returns a note if another split is used than the requested one; [] if not.

    Args:
      split: the requested split.
      found: the split that is used.
      why: reason; '' if there is no split of the requested name.
    """
    if found == split:
        return []
    return [f'{why or f"there is no split {split!r}"}: using {found!r} instead']


def missing_split(
    where: str, split: str, present: Iterable[str], dataset: ConfigDict, config: ConfigDict
) -> NoSplit:
    """Makes the error for a missing split, with the flags that help.

    Args:
      where: name of the data set, for the message.
      split: the missing split.
      present: the existing splits.
      dataset: config.target or config.source.
      config: configuration of the run.
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
            ways.append(f'{name}, which is then split at random')
    else:
        ways = [shlex.quote(f'--config.{part}.split={name}') for name in names[:3]]
    advice = f': use {" or ".join(ways)}' if ways else ''
    return NoSplit(f'{where} has no split {split!r}: {has}', advice)


def split_class(split: str, count: int, label: int, share: float) -> np.ndarray:
    """Splits the images of a class at random, for data sets without splits.

    Args:
      split: 'train' or 'test'.
      count: number of images of the class.
      label: number of the class, used as the seed: the result is the same in every run.
      share: share of the test images, rounded; at least one image is left for training.

    Returns:
      positions of the split's images within the class, ascending.
    """
    order = np.random.default_rng(label).permutation(count)
    tested = min(round(share * count), count - 1)
    return np.sort(order[:tested] if split == 'test' else order[tested:])
