"""Opening data sets, and choosing the records of a run."""

from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources import find_source
from xmixup_jax.errors import DataError


class Data(NamedTuple):
    """What a run trains and tests on.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    >>> target = Records.from_arrays(images, labels, ['cat', 'dog'])
    >>> data = Data(target.select(np.array([0, 1])), target.select(np.array([2, 3])), None)
    >>> len(data.target), len(data.test)
    (2, 2)
    """

    target: Records
    test: Records | None
    source: Records | None
    """None for methods that use none."""

    def summary(self) -> dict[str, dict[str, Any] | None]:
        """`Records.summary` of 'target', 'test' and 'source'."""
        parts = self._asdict().items()
        return {part: None if each is None else each.summary() for part, each in parts}


def draw_positions(records: Records, shots: int, sample_rate: float, seed: int) -> np.ndarray:
    """Positions of some records of every class, at random; ascending, int64.

    Args:
      records: to draw from.
      shots: records of each class, or 0 for
      sample_rate: the share of each class's records, rounded, at least one.
      seed: of the draw.

    Raises:
      DataError: a class has fewer than `shots` records.
    """
    rng = np.random.default_rng(seed)
    positions = []
    for label, name in enumerate(records.class_names):
        candidates = np.flatnonzero(records.labels == label)
        if len(candidates) < shots:
            raise DataError(
                f'class {name!r} of {records.name} has {len(candidates)} training images, fewer '
                f'than shots={shots}: lower it, or 0 for all images'
            )
        count = shots or min(len(candidates), max(1, round(sample_rate * len(candidates))))
        positions.append(rng.choice(candidates, count, replace=False))
    return np.sort(np.concatenate(positions))


Opened = dict[tuple[str, str, float], Records]
"""Whole splits by name of the data set, split and test_share, for runs that share what they have
opened."""


def open_split(
    dataset: ConfigDict, split: str, config: ConfigDict, opened: Opened | None = None
) -> Records:
    """Opens one split of `dataset` (config.source or config.target).

    Args:
      dataset: gives the name.
      split: of it.
      config: gives the folders.
      opened: where to look first, and to leave what is opened, decoded images included.

    Raises:
      DataError: the data set, the split or its classes are missing; says what to do.
    """
    key = (dataset.name, split, dataset.test_share)
    if opened is not None and key in opened:
        return opened[key]
    source, what = find_source(dataset.name)
    missing = source.problem(what, config)
    if missing:
        raise DataError(missing)
    records = source.open(what, dataset, split, config, Store(config.max_bad_images))
    if not len(records):
        raise DataError(f'split {split!r} of {dataset.name} holds no images')
    if opened is not None:
        opened[key] = records
    return records


def train_records(dataset: ConfigDict, config: ConfigDict, opened: Opened | None = None) -> Records:
    """The records to train on: `dataset.split`, or some of each class (shots, sample_rate)."""
    return _draw(open_split(dataset, dataset.split, config, opened), dataset, config)


def _draw(full: Records, dataset: ConfigDict, config: ConfigDict) -> Records:
    if not dataset.shots and dataset.sample_rate == 1:
        return full
    return full.select(draw_positions(full, dataset.shots, dataset.sample_rate, config.seed))


def train_and_test(
    dataset: ConfigDict, config: ConfigDict, opened: Opened | None = None
) -> tuple[Records, Records | None]:
    """The training records and the test records.

    `dataset.test_split` names a split, or 'rest' for the records of the training split that
    few-shot selection left over, or '' for none.
    """
    full = open_split(dataset, dataset.split, config, opened)
    train = _draw(full, dataset, config)
    if not dataset.test_split:
        return train, None
    if dataset.test_split == 'rest':
        return train, full.select(np.setdiff1d(full.index, train.index))
    test = open_split(dataset, dataset.test_split, config, opened)
    if test.class_names != train.class_names:
        odd = sorted(set(test.class_names) ^ set(train.class_names))
        raise DataError(
            f'the splits {dataset.split!r} and {dataset.test_split!r} of {dataset.name} differ in '
            f'their classes, for example {odd[0]!r}: both need the same class folders'
        )
    return train, test
