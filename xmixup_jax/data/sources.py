"""Records: random access to the encoded images and the labels of one split of a data set.

A data set is named either `NAME` (a tfds builder, read as array_record without TensorFlow) or
`folder:PATH` (an image folder, PATH/SPLIT/CLASS/FILE).
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from ml_collections import ConfigDict

from xmixup_jax.data import digits  # noqa: F401  (registers the project's own builders)
from xmixup_jax.data.decode import decode
from xmixup_jax.errors import DataError
from xmixup_jax.files import whole_file

log = logging.getLogger('xmixup_jax')

FOLDER = 'folder:'
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm')

# Builders whose images come inside a package, so that preparing them needs no permission.
_IN_PACKAGES = ('mnist5k', 'uci_digits')

# Data sets of the experiments that tfds has no builder for, and where their archive is.
_NO_BUILDER = {
    'fgvc_aircraft': 'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz',
}


@dataclass(frozen=True)
class Records:
    """One split, or a selection from it."""

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    """int32 [N], 0 <= label < K = len(class_names)."""
    read: Callable[[int], bytes]
    """Record number to encoded image; safe to call from several threads."""
    where: Callable[[int], str]
    """Record number to words that find it again, for errors."""
    index: np.ndarray
    """int64 [N], the record numbers of this selection."""
    keep_bytes: int
    """Limit of `kept`."""
    kept: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False)
    """Decoded images by record number and side, shared by all selections from one split."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int, resize: int) -> np.ndarray:
        """uint8 [resize, resize, 3]; decoded once, as long as there is room for it.

        Images that are kept are never given up for others: epochs go round, so that the one that
        was not used for longest is the one that is needed next.
        """
        number = int(self.index[i])
        image = self.kept.get((number, resize))
        if image is None:
            image = decode(self.read(number), resize, self.where(number))
            if (len(self.kept) + 1) * image.nbytes <= self.keep_bytes:
                self.kept[number, resize] = image
        return image

    def describe(self, i: int) -> str:
        return self.where(int(self.index[i]))

    def select(self, positions: np.ndarray) -> 'Records':
        """The records at these positions of this selection."""
        return replace(self, labels=self.labels[positions], index=self.index[positions])

    def restrict(self, classes: np.ndarray) -> 'Records':
        """The records of these classes alone, which are numbered anew in the order given."""
        number = np.full(len(self.class_names), -1, np.int32)
        number[classes] = np.arange(len(classes), dtype=np.int32)
        chosen = self.select(np.flatnonzero(number[self.labels] >= 0))
        names = tuple(self.class_names[c] for c in classes)
        return replace(chosen, labels=number[chosen.labels], class_names=names)


class Data(NamedTuple):
    """What a run trains and tests on."""

    target: Records
    test: Records | None
    source: Records | None
    """None for methods that use none."""


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


Opened = dict[tuple[str, str], Records]
"""Whole splits by name of the data set and split, for runs that share what they have opened."""


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
      DataError: the data set, the split or its classes cannot be had; says what to do.
    """
    if opened is not None and (dataset.name, split) in opened:
        return opened[dataset.name, split]
    missing = problem(dataset.name, config)
    if missing:
        raise DataError(missing)
    if dataset.name.startswith(FOLDER):
        records = _open_folder(dataset.name, split, config.keep_decoded_mb)
    else:
        folders = (config.data_dir, config.cache_dir)
        records = _open_tfds(dataset.name, split, *folders, config.keep_decoded_mb)
    if not len(records):
        raise DataError(f'split {split!r} of {dataset.name} holds no images')
    if opened is not None:
        opened[dataset.name, split] = records
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


def problem(name: str, config: ConfigDict) -> str | None:
    """Says what is missing before data set `name` can be read and how to get it, or None."""
    if name.startswith(FOLDER):
        path = Path(name[len(FOLDER) :]).expanduser()
        if path.is_dir():
            return None
        return (
            f'image folder {path} does not exist: it should hold SPLIT/CLASS/FILE, '
            'or name another with folder:PATH'
        )
    if name in _IN_PACKAGES:
        return None
    try:
        builder = _builder(name, config.data_dir)
    except tfds.core.DatasetNotFoundError:
        return _unknown(name)
    if not builder.info.splits:
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        manual = re.sub(r'\s+', ' ', manual).strip() if manual else ''
        manual_dir = Path(builder.data_dir).parents[1] / 'downloads' / 'manual'
        data_dir = f', data_dir={config.data_dir!r}' if config.data_dir else ''
        return (
            f'data set {name} is not prepared in {builder.data_dir}: '
            + (f'put its archives into {manual_dir} ({manual}), then ' if manual else '')
            + f'run  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}'
            f"{data_dir}, file_format='array_record').download_and_prepare()\""
        )
    return None


def _unknown(name: str) -> str:
    if name in _NO_BUILDER:
        return (
            f'data set {name} has no tfds builder: get {_NO_BUILDER[name]}, sort its images into '
            f'{name}/SPLIT/CLASS/FILE and pass --config.target.name=folder:{name}'
        )
    close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 3)
    hint = f'did you mean {" or ".join(close)}? ' if close else ''
    return f'there is no data set {name}: {hint}Use a tfds name, or folder:PATH for an image folder'


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    data_dir = str(Path(data_dir).expanduser()) if data_dir else None
    # tfds warns of every folder that is about to be written for the first time.
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        return tfds.builder(name, data_dir=data_dir, file_format='array_record')
    finally:
        absl_logging.set_verbosity(verbosity)


def _open_tfds(name: str, split: str, data_dir: str, cache_dir: str, keep_mb: int) -> Records:
    builder = _builder(name, data_dir)
    if not builder.info.splits:
        log.info('Writing %s as array_record to %s', name, builder.data_dir)
        builder.download_and_prepare()
    image_key, label_key = builder.info.supervised_keys or ('image', 'label')
    try:
        data_source = builder.as_data_source(
            split=split, decoders={image_key: tfds.decode.SkipDecoding()}
        )
    except (ValueError, KeyError) as error:
        raise DataError(
            f'{name} has no split {split!r}: it has {", ".join(sorted(builder.info.splits))}'
        ) from error
    except NotImplementedError as error:
        raise DataError(
            f'{name} in {builder.data_dir} is not stored as array_record: prepare it again '
            "with file_format='array_record' in another data_dir"
        ) from error
    return Records(
        name=name,
        class_names=tuple(builder.info.features[label_key].names),
        labels=_tfds_labels(data_source, label_key, builder, split, cache_dir),
        read=lambda i: data_source[i][image_key],
        where=lambda i: f'record {i} of {name} ({split})',
        index=np.arange(len(data_source)),
        keep_bytes=keep_mb * 2**20,
    )


def _tfds_labels(data_source, label_key, builder, split, cache_dir) -> np.ndarray:
    """Every record's label; kept on disk, for finding them means reading the whole split."""
    key = f'{builder.data_dir} {split} {len(data_source)}'
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(cache_dir).expanduser() / 'labels' / f'{builder.name}-{digest}.npy'
    if path.exists():
        return np.load(path, allow_pickle=False)
    labels = np.array([record[label_key] for record in data_source], np.int32)
    with whole_file(path) as partial, partial.open('wb') as file:
        np.save(file, labels)
    return labels


def _open_folder(name: str, split: str, keep_mb: int) -> Records:
    root = Path(name[len(FOLDER) :]).expanduser() / split
    if not root.is_dir():
        present = sorted(p.name for p in root.parent.iterdir() if p.is_dir())
        raise DataError(
            f'{root.parent} has no split {split!r}: it has {", ".join(present) or "none"}'
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f'class folder {folder} holds no images: fill or remove it')
        files += found
        labels += [label] * len(found)
    return Records(
        name=name,
        class_names=tuple(folder.name for folder in folders),
        labels=np.array(labels, np.int32),
        read=lambda i: files[i].read_bytes(),
        where=lambda i: str(files[i]),
        index=np.arange(len(files)),
        keep_bytes=keep_mb * 2**20,
    )
