"""Opens data sets and selects the records of a run."""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources import find_source
from xmixup_jax.data.sources.splits import NoSplit, part_name
from xmixup_jax.errors import DataError
from xmixup_jax.text import first_few

log = logging.getLogger('xmixup_jax')


class Data(NamedTuple):
    """The records that a run trains and tests on.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    >>> target = Records.from_arrays(images, labels, ['cat', 'dog'])
    >>> data = Data(target.select(np.array([0, 1])), target.select(np.array([2, 3])), None)
    >>> len(data.target), len(data.test)
    (2, 2)
    """

    target: Records
    test: Records | None
    source: Records | None
    """None for methods that do not use a source."""
    validation: Records | None = None
    """The part of the training images that is used to choose the best network."""

    @property
    def held_out_part(self) -> str:
        """Name of the part that is tested during training: 'validation' if present, else 'test'."""
        return 'test' if self.validation is None else 'validation'

    @property
    def held_out(self) -> Records | None:
        """The records that are tested during training."""
        return getattr(self, self.held_out_part)

    def parts(self) -> dict[str, Records]:
        """Returns the parts that are present: 'target', 'test', 'source', 'validation'."""
        return {part: each for part, each in self._asdict().items() if each is not None}

    def summary(self) -> dict[str, dict[str, Any] | None]:
        """Returns `Records.summary` of each part; None for a missing target, test or source."""
        summaries = {part: each.summary() for part, each in self.parts().items()}
        return dict.fromkeys(('target', 'test', 'source')) | summaries

    def usage(self) -> dict[str, dict[str, Any]]:
        """Returns `Records.usage` of each part that is present."""
        return {part: each.usage() for part, each in self.parts().items()}

    def log_usage(self) -> None:
        """Logs `Records.usage_line` of each part that is present."""
        for part, records in self.parts().items():
            log.info('%s: %s', part, records.usage_line())
        if len(self.target.class_names) == 1:
            log.warning('the target has only one class, %r', self.target.class_names[0])


def draw_positions(
    records: Records, shots: int, sample_rate: float, seed: int, part: str = 'target'
) -> np.ndarray:
    """Draws some records of every class at random.

    Args:
      records: records to draw from.
      shots: records to draw per class; 0: use `sample_rate` instead.
      sample_rate: share of each class's records to draw, rounded, at least one record.
      seed: seed of the draw.
      part: 'target' or 'source', for the flag in the error message.

    Returns:
      positions in `records`, int64, ascending.

    Raises:
      DataError: a class has fewer than `shots` records.
    """
    rng = np.random.default_rng(seed)
    positions = []
    for label, name in enumerate(records.class_names):
        candidates = np.flatnonzero(records.labels == label)
        if len(candidates) < shots:
            least = int(np.bincount(records.labels, minlength=len(records.class_names)).min())
            raise DataError(
                f'class {name!r} of {records.name} has {len(candidates)} training images, fewer '
                f'than shots={shots}: use --config.{part}.shots={least}, the size of the smallest '
                'class, or 0 for all images'
            )
        count = shots or min(len(candidates), max(1, round(sample_rate * len(candidates))))
        positions.append(rng.choice(candidates, count, replace=False))
    return np.sort(np.concatenate(positions))


Opened = dict[tuple[str, str, float], Records]
"""Whole splits by (name of the data set, split, test_share), for sharing between runs."""


def open_split(
    dataset: ConfigDict, split: str, config: ConfigDict, opened: Opened | None = None
) -> Records:
    """Opens one split of `dataset` (config.source or config.target).

    Args:
      dataset: configuration of the data set.
      split: name of the split.
      config: configuration of the run, for its folders.
      opened: splits that were opened before; the split is taken from here, or added (together with
        its decoded images).

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
        part = part_name(dataset, config)
        flag = f'--config.{part}.test_share'
        advice = ': add images to it, or name another split'
        if split == dataset.test_split == 'test':
            advice = (
                f': with {flag}={dataset.test_share:g} every class is too small to split; use '
                + (f'{flag}=0.5' if dataset.test_share < 0.5 else 'more images')
            )
        raise NoSplit(f'split {split!r} of {dataset.name} contains no images', advice)
    if opened is not None:
        opened[key] = records
    return records


def train_records(dataset: ConfigDict, config: ConfigDict, opened: Opened | None = None) -> Records:
    """Opens the training records: `dataset.split`, or a draw from it (shots, sample_rate)."""
    return _draw(open_split(dataset, dataset.split, config, opened), dataset, config)


def _draw(full: Records, dataset: ConfigDict, config: ConfigDict) -> Records:
    if not dataset.shots and dataset.sample_rate == 1:
        return full
    part, share = part_name(dataset, config), dataset.sample_rate
    return full.select(draw_positions(full, dataset.shots, share, config.seed, part))


def train_and_test(
    dataset: ConfigDict, config: ConfigDict, opened: Opened | None = None
) -> tuple[Records, Records | None]:
    """Opens the training records and the test records.

    `dataset.test_split` is the name of a split, 'rest' for the records of the training split that
    the few-shot draw left over, or '' for no test.

    Returns:
      (training records, test records or None).

    Raises:
      DataError: there are no such records, or a test class is not among the training classes.
    """
    full = open_split(dataset, dataset.split, config, opened)
    train = _draw(full, dataset, config)
    if not dataset.test_split:
        return train, None
    if dataset.test_split == 'rest':
        rest = full.select(np.setdiff1d(full.index, train.index))
        if not len(rest):
            part = part_name(dataset, config)
            raise DataError(
                f'--config.{part}.test_split=rest: all images of {dataset.name} are used for '
                f'training; lower --config.{part}.shots, or name a split to test on'
            )
        return train, _numbered_as(train, rest, dataset)
    test = open_split(dataset, dataset.test_split, config, opened)
    if dataset.test_split == dataset.split:
        test = replace(test, notes=(*test.notes, 'this is the training split'))
    return train, _numbered_as(train, test, dataset)


def split_validation(
    train: Records, dataset: ConfigDict, config: ConfigDict
) -> tuple[Records, Records | None]:
    """Sets `dataset.validation_share` of each class's training records aside for validation.

    Every class keeps at least one record for training.

    Returns:
      (training records, validation records); the latter None if the share is 0.

    Raises:
      DataError: no class is large enough to spare a record.
    """
    if not dataset.validation_share:
        return train, None
    part = part_name(dataset, config)
    kept = draw_positions(train, 0, 1 - dataset.validation_share, config.seed, part)
    rest = np.setdiff1d(np.arange(len(train)), kept)
    if not len(rest):
        largest = int(np.bincount(train.labels).max())
        raise DataError(
            f'--config.{part}.validation_share={dataset.validation_share:g} of {dataset.name} is '
            f'less than half an image in every class (the largest has {largest}): use a larger '
            'share, or more images'
        )
    return train.select(kept), train.select(rest)


def renumber(records: Records, class_names: tuple[str, ...]) -> Records:
    """Relabels records by the positions of their classes in `class_names`, a superset."""
    places = {name: i for i, name in enumerate(class_names)}
    number = np.array([places[name] for name in records.class_names], np.int32)
    return replace(records, labels=number[records.labels], class_names=class_names)


def _numbered_as(train: Records, test: Records, dataset: ConfigDict) -> Records:
    """Labels the test records like the training records; a class may have no test records.

    Raises:
      DataError: a test class is not among the training classes.
    """
    if test.class_names != train.class_names:
        known = {name.casefold(): name for name in train.class_names}
        there = set(train.class_names)
        odd = [name for name in test.class_names if name not in there]
        if odd and odd[0].casefold() in known:
            raise DataError(
                f'class {odd[0]!r} of the split {dataset.test_split!r} of {dataset.name} is called '
                f'{known[odd[0].casefold()]!r} in {dataset.split!r}: give both the same name'
            )
        if odd:
            raise DataError(
                f'class {odd[0]!r} of {dataset.name} has images in the split '
                f'{dataset.test_split!r} but none in {dataset.split!r}: add training images, or '
                f'remove the class ({len(odd)} such classes)'
            )
        test = renumber(test, train.class_names)
    counts = np.bincount(test.labels, minlength=len(test.class_names))
    without = [test.class_names[c] for c in np.flatnonzero(counts == 0)]
    if without:
        shown = first_few(list(map(repr, without)))
        notes = (*test.notes, f'no test images of {len(without)} classes ({shown})')
        test = replace(test, notes=notes)
    return test
