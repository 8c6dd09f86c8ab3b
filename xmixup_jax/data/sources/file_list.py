"""Lists of image files with their labels, `csv:FILE`.

The file is a table with a header and the columns `path`, `label` and, optionally, `split`; other
columns are ignored. Paths are absolute, or relative to the file's folder.
"""

import csv
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources.image_files import open_files
from xmixup_jax.data.sources.listing import HIDDEN, Image, is_system, nfc
from xmixup_jax.data.sources.splits import (
    UNDIVIDED_SPLITS,
    find_split,
    missing_split,
    same_split,
    split_class,
    substitution_note,
)
from xmixup_jax.errors import DataError
from xmixup_jax.text import first_few

_REQUIRED = ('path', 'label')


class Row(NamedTuple):
    """A row of the list. Rows are sorted, so that their order in the file has no effect."""

    label: str
    path: str
    """Absolute path of the image."""
    split: str | None
    """None if the list has no column `split`."""


def problem(what: str, config: ConfigDict) -> str | None:
    """Reports a list that does not exist or lacks a column; None if all is well."""
    path = Path(what).expanduser()
    if not path.is_file():
        return (
            f'list of images {path} does not exist: it should be a table with the columns '
            'path,label and optionally split; name another with csv:FILE'
        )
    try:
        with _open_text(path) as file:
            _table(path, file)
    except DataError as error:
        return str(error)
    return None


def prepare(what: str, config: ConfigDict) -> None:
    """A list needs no preparation."""


def open(what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store) -> Records:
    """Opens one split. The classes are the labels of the whole list, sorted.

    Without a column `split`, the list is split at random like a folder without split folders, and
    the split '' is the whole list; see `folder.open`.

    Raises:
      DataError: there is no such split, a row lacks a value or is duplicated, or a file is missing.
    """
    path = Path(what).expanduser()
    rows = read_rows(path)
    usable = [row for row in rows if not is_system(Path(row.path).name)]
    left_out = Counter({HIDDEN: len(rows) - len(usable)} if len(usable) < len(rows) else {})
    rows = usable
    class_names = sorted({row.label for row in rows})
    notes: list[str] = []
    rows = _in_split(path, rows, split, dataset, config, notes)
    absent = sorted(set(class_names) - {row.label for row in rows})
    if absent and split == dataset.split:  # a test need not have every class
        raise DataError(
            f'{path} has no images of {first_few(absent)} in the split {split!r}: add some, or '
            'remove the class from the other splits'
        )
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number[row.label] for row in rows], np.int32)
    images = _images(path, rows)
    return open_files(dataset.name, class_names, labels, images, store, left_out, notes)


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of the list, sorted.

    Raises:
      DataError: a column or a value is missing, or a file is listed twice.
    """
    rows: list[Row] = []
    faults: dict[str, list[str]] = {}
    folder = os.path.abspath(path.parent)  # noqa: PTH100  (a million strings, not Paths)
    with _open_text(path) as file:
        table = _table(path, file)
        keys = [key for key in ('path', 'label', 'split') if key in (table.fieldnames or ())]
        try:
            for line in table:
                values = {key: (line[key] or '').strip() for key in keys}
                found = [f'without a {key}' for key in keys if not values[key]]
                if None in line:
                    found.append('with more values than the header has columns')
                for fault in found:
                    faults.setdefault(fault, []).append(f'line {table.line_num}')
                image = os.path.expanduser(values['path'])  # noqa: PTH111
                image = os.path.normpath(os.path.join(folder, image))  # noqa: PTH118
                rows.append(Row(nfc(values['label']), image, values.get('split')))
        except (csv.Error, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error
    for fault, lines in faults.items():
        raise DataError(
            f'{path} has rows {fault}: {len(lines)} ({first_few(lines)}); correct or remove them'
        )
    if not rows:
        raise DataError(f'{path} lists no images: add rows below its header')
    counts = Counter(row.path for row in rows)
    twice = [image for image, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f'{path} lists {len(twice)} files more than once ({first_few(twice)}): '
            'keep one row each'
        )
    return sorted(rows)


def _open_text(path: Path) -> TextIO:
    return path.open(encoding='utf-8-sig', newline='')


def _table(path: Path, file: TextIO) -> csv.DictReader:
    """Returns a reader for the rows below the header.

    Raises:
      DataError: the header lacks a column.
    """
    table = csv.DictReader(file, skipinitialspace=True)
    try:
        header = [(name or '').strip().casefold() for name in table.fieldnames or ()]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    table.fieldnames = header
    for name in ('path', 'label', 'split'):
        if header.count(name) > 1:
            raise DataError(f'{path} has {header.count(name)} columns named {name!r}: keep one')
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise DataError(
            f'{path} has no column {missing[0]!r}: its first line is {",".join(header)[:80]!r} '
            'and should be path,label or path,label,split'
        )
    return table


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f'{path} is not a comma-separated table in UTF-8 ({error}): save it as one')


def _in_split(
    path: Path,
    rows: list[Row],
    split: str,
    dataset: ConfigDict,
    config: ConfigDict,
    notes: list[str],
) -> list[Row]:
    named = sorted({row.split for row in rows if row.split is not None})
    if not (split or named):
        return rows
    found = find_split(split, named or UNDIVIDED_SPLITS)
    if found is None:
        raise missing_split(str(path), split, named or UNDIVIDED_SPLITS, dataset, config)
    if named:
        notes += substitution_note(split, found)
        return [row for row in rows if row.split and same_split(row.split, found)]
    share = dataset.test_share
    chosen = []
    first, counts = 0, Counter(row.label for row in rows)
    for label, name in enumerate(sorted(counts)):
        part = split_class(found, counts[name], label, share)
        chosen += [rows[first + i] for i in part]
        first += counts[name]
    return chosen


def _images(path: Path, rows: Sequence[Row]) -> list[Image]:
    """Finds the rows' files, each under the Unicode form of its name on disk.

    Raises:
      DataError: files are missing.
    """
    if not rows:
        return []
    found = [_find_on_disk(row.path) for row in rows]
    missing = [row.path for row, file in zip(rows, found, strict=True) if file is None]
    if missing:
        raise DataError(
            f'{len(missing)} of {len(rows)} files listed in {path} are missing '
            f'({first_few(missing)}): paths are relative to {path.parent}'
            + (' and use /, not \\, between folders' if '\\' in missing[0] else '')
            + '; correct or remove them'
        )
    files = [file for file in found if file is not None]
    # Relative to the images' common folder, so that the list may be anywhere.
    root = os.path.commonpath([os.path.dirname(place) for place, _ in files])  # noqa: PTH120
    return [
        Image(place, nfc(place[len(root) :].lstrip('/')), file.st_size, file.st_mtime_ns)
        for place, file in files
    ]


def _unicode_forms(path: str) -> Iterator[str]:
    yield path
    yield unicodedata.normalize('NFC', path)
    yield unicodedata.normalize('NFD', path)


def _find_on_disk(path: str) -> tuple[str, os.stat_result] | None:
    """Finds a file under any Unicode form of its name; returns its path and status, or None."""
    for place in _unicode_forms(path):
        try:
            file = os.stat(place)  # noqa: PTH116
        except (OSError, ValueError):  # ValueError: not a valid file name
            continue
        if stat.S_ISREG(file.st_mode):  # reading a pipe would block forever
            return place, file
    return None
