"""Compares the predictions of finished runs to their test images, from predictions.csv."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Opened, train_and_test
from xmixup_jax.errors import DataError
from xmixup_jax.files import PREDICTIONS
from xmixup_jax.report.classes import thumbnail
from xmixup_jax.report.differences import Predictions, differences_part, paired
from xmixup_jax.text import one_line, valid_text


class Finished(NamedTuple):
    """A finished run."""

    workdir: Path
    config: ConfigDict


def read_predictions(workdir: Path, records: Records) -> Predictions:
    """A run's predictions, from its predictions.csv.

    Args:
      workdir: of the run.
      records: that it was tested on, wherever they are now.

    Raises:
      DataError: there is no such file, it is damaged, or it is of other images.
    """
    path, names = workdir / PREDICTIONS, readable(records.class_names)
    if not path.is_file():
        raise DataError(
            f'{one_line(path)} is missing: the run had no test images (config.target.test_split), '
            'or an earlier version made it; train again in another --workdir'
        )
    label_of = {name: c for c, name in enumerate(names)}
    images, rows = [], []
    try:
        with path.open(newline='', encoding='utf-8') as file:
            lines = csv.reader(file)
            few = next(lines)[3:] == names  # else the best ones, in descending order
            for image, true_class, prediction, *cells in lines:
                c = label_of[prediction]
                images.append(image)
                rows.append((label_of[true_class], c, float(cells[c if few else 1])))
    except (ValueError, LookupError, StopIteration) as error:
        raise DataError(
            f'{one_line(path)} is damaged, or its classes are not those of {records.name}: run '
            'the training command again, which restores it'
        ) from error
    label, predicted, probability = np.array(rows, np.float64).reshape(-1, 3).T
    places = _places(images, records)
    if places is None or not np.array_equal(records.labels[places], label):
        raise DataError(
            f'{one_line(path)} is of other images than {one_line(records.name)}: restore those '
            'that the run was tested on'
        )
    return Predictions(records.index[places], label.astype(int), predicted.astype(int), probability)


def _places(images: Sequence[str], records: Records) -> np.ndarray | None:
    """Places of images in the records; None if one is not there.

    All are there, in order, unless some could not be decoded. Then the names decide, and only then:
    the data may have moved.
    """
    if len(images) == len(records):
        return np.arange(len(records))
    place = {valid_text(records.describe(i)): i for i in range(len(records))}
    found = [place.get(image) for image in images]
    return None if None in found else np.array(found, np.int64)


def where_they_differ(
    first: Mapping[int, Finished],
    second: Mapping[int, Finished],
    methods: tuple[str, str],
    opened: Opened,
) -> dict[str, Any]:
    """The values of the macro in differences.html, for two methods with the seeds that both have.

    Args:
      first, second: runs by seed, at least one of them common.
      methods: what to call the two.
      opened: data sets that have been opened; extended.

    Raises:
      DataError: the data cannot be opened, or a run's predictions cannot be read.
    """
    pairs, tests = {}, []
    for seed in sorted(first.keys() & second.keys()):
        config = second[seed].config
        _, test = train_and_test(config.target, config, opened)
        if test is None:
            raise DataError(f'{one_line(second[seed].workdir)} had no test images')
        tests.append(test)
        pairs[seed] = paired(
            *(read_predictions(each[seed].workdir, test) for each in (first, second))
        )

    def picture(number: int) -> str | None:
        records = next(each for each in tests if number in each.index)
        return thumbnail(records, int(np.flatnonzero(records.index == number)[0]), config)

    return differences_part(pairs, methods, readable(tests[0].class_names), picture)
