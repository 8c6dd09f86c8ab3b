"""Data sets of tfds and of this package's own builders, `tfds:NAME` or `NAME`.

They are stored as array_record and read without TensorFlow.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from ml_collections import ConfigDict
from tqdm import tqdm

from xmixup_jax.data import builders, digits
from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources.splits import (
    NoSplit,
    find_split,
    missing_split,
    substitution_note,
)
from xmixup_jax.errors import DataError, first_line
from xmixup_jax.files import Resumable, file_lock, load_arrays

log = logging.getLogger('xmixup_jax')

# Builders whose images ship inside Python packages. They are prepared automatically, as nothing has
# to be downloaded.
IN_PACKAGES = ('mnist5k', 'uci_digits')
_CHUNK = 1000  # records to read at a time for their labels


def make_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the tfds builder of this name.

    Args:
      name: tfds name, for example 'imagenet_resized/64x64'.
      data_dir: tfds's data folder; '': its default.

    Raises:
      DataError: there is no such builder; suggests similar names.
    """
    folder = str(Path(data_dir).expanduser()) if data_dir else None
    # tfds warns about every folder that does not exist yet.
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        return tfds.builder(name, data_dir=folder, file_format='array_record')
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, 3)
        hint = f'did you mean {" or ".join(close)}? ' if close else ''
        raise DataError(
            f'there is no data set {name}: {hint}Use a tfds name, or folder:PATH for an image '
            'folder'
        ) from error
    except Exception as error:  # tfds raises all kinds of errors for invalid names and versions
        raise DataError(
            f'{name!r} is not a valid tfds name ({first_line(error)}): use '
            'NAME[/CONFIG][:VERSION], or folder:PATH for an image folder'
        ) from error
    finally:
        absl_logging.set_verbosity(verbosity)


def problem(what: str, config: ConfigDict) -> str | None:
    """Says how to get a data set that is not on disk yet."""
    if what in IN_PACKAGES:
        return None
    try:
        builder = make_builder(what, config.data_dir)
    except DataError as error:
        return str(error)
    if builder.info.splits:
        return None
    return (
        f'data set {what} is not prepared in {builder.data_dir}: {_manual_download(builder)}run  '
        'xmixup prepare  with the same --config flags'
    )


def prepare(what: str, config: ConfigDict) -> str:
    """Downloads and converts the data set; returns its folder."""
    return str(build(what, config.data_dir).data_dir)


def _manual_download(builder: tfds.core.DatasetBuilder) -> str:
    """Says which archives to download by hand, and where to put them; '' if none are needed."""
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return ''
    words = re.sub(r'\s+', ' ', builder.MANUAL_DOWNLOAD_INSTRUCTIONS).strip()
    return f'put its archives into {_manual_dir(builder)} ({words}), then '


def _manual_dir(builder: tfds.core.DatasetBuilder) -> Path:
    root = Path(builder.data_dir).parents[builder.info.full_name.count('/')]
    return root / 'downloads' / 'manual'


def build(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Downloads and converts a data set, unless that has been done. Finished downloads are kept.

    Args:
      name: tfds name.
      data_dir: tfds's data folder; '': its default.

    Raises:
      DataError: archives are missing, the download failed, or the builder needs TensorFlow.
    """
    builder = make_builder(name, data_dir)
    if builder.info.splits:
        return builder
    # If another process is building it, wait: the data set exists afterwards.
    with file_lock(Path(builder.data_dir).with_name('.building'), '--config.data_dir', wait=True):
        return _build_alone(name, data_dir)


def _build_alone(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    builder = make_builder(name, data_dir)
    if builder.info.splits:
        return builder
    missing = build_problem(builder)
    if missing:
        raise DataError(missing)
    log.info('Writing %s as array_record to %s', name, builder.data_dir)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except (tfds.download.DownloadError, OSError, AssertionError) as error:
        raise DataError(
            f'data set {name} cannot be prepared: {" ".join(str(error).split())[:500]}; '
            'run the same command again, or download its archives by hand'
        ) from error
    return builder


def build_problem(builder: tfds.core.DatasetBuilder) -> str | None:
    """Says why `build` would fail, before it downloads anything; None if nothing is missing."""
    if builder.info.splits:
        return None
    own = type(builder).__module__ in (builders.__name__, digits.__name__)
    if not own and importlib.util.find_spec('tensorflow') is None:
        return (
            f"tfds's builder of {builder.name} needs TensorFlow to unpack and convert the archives "
            '(reading them later does not): run  pip install tensorflow-cpu , then the same '
            'command again'
        )
    manual = _manual_dir(builder)
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
        return f'data set {builder.name}: {_manual_download(builder)}run the same command again'
    return None


def open(what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store) -> Records:
    """Opens one split of a prepared data set.

    Raises:
      DataError: there is no such split, or it is not stored as array_record.
    """
    builder = build(what, config.data_dir)
    notes = []
    if split.isidentifier() and split not in builder.info.splits:
        named = find_split(split, builder.info.splits)
        if named is None:
            raise missing_split(what, split, sorted(builder.info.splits), dataset, config)
        notes += substitution_note(split, named)
        split = named
    image_key, label_key = builder.info.supervised_keys or ('image', 'label')
    features = builder.info.features
    kinds = {image_key: tfds.features.Image, label_key: tfds.features.ClassLabel}
    if not all(key in features and isinstance(features[key], k) for key, k in kinds.items()):
        raise DataError(
            f'{what} is no data set for classification: each record must have an image and the '
            f'label of a class, and it has {", ".join(sorted(features))}'
        )
    try:
        data_source = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except (ValueError, KeyError) as error:
        raise missing_split(what, split, sorted(builder.info.splits), dataset, config) from error
    except NotImplementedError as error:
        raise DataError(
            f'{what} in {builder.data_dir} is not stored as array_record: prepare it again '
            "with file_format='array_record' in another data_dir"
        ) from error

    def parser(key: str):
        # Only this feature: otherwise others, such as masks and boxes, would be decoded as well.
        only = tfds.features.FeaturesDict({key: features[key]})
        decoders = {image_key: tfds.decode.SkipDecoding()} if key == image_key else None
        return lambda raw: only.deserialize_example_np(raw, decoders=decoders)[key]

    image, label = parser(image_key), parser(label_key)
    count = len(data_source)
    digest = _digest(builder, split, count)
    labels_path = Path(config.cache_dir).expanduser() / 'labels' / f'{builder.name}-{digest}.npz'
    labels = split_labels(data_source, label, labels_path, f'{builder.name} {split}')
    if count and labels.min() < 0:
        raise NoSplit(f'split {split!r} of {what} has no labels', ': name another split')
    return Records(
        name=dataset.name,
        class_names=tuple(features[label_key].names),
        labels=labels,
        read=lambda i: image(data_source[i]),
        where=lambda i: f'record {i} of {what} ({split})',
        index=np.arange(count),
        store=store,
        # Wraps around at 2**64.
        stamps=np.uint64(int(digest, 16)) + np.arange(count, dtype=np.uint64),
        notes=tuple(notes),
    )


def _digest(builder: tfds.core.DatasetBuilder, split: str, count: int) -> str:
    """Returns 16 hexadecimal digits that identify a split's records, wherever they are stored."""
    stored = [
        (name, each.shard_lengths, each.num_bytes) for name, each in builder.info.splits.items()
    ]
    content = [builder.info.full_name, sorted(stored), split, count]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def split_labels(data_source, label, path: Path, title: str) -> np.ndarray:
    """Reads every record's label.

    This means reading the whole split, so the labels are cached on disk. After an interruption, the
    next call resumes where the last one stopped.

    Args:
      data_source: serialised examples, by position.
      label: maps an example to its label.
      path: the cache file.
      title: names the split in the progress bar.

    Returns:
      int32 [N].
    """
    found = load_arrays(path, 'labels')
    if found is None:
        with file_lock(path.with_suffix('.lock'), '--config.cache_dir', wait=True):
            # Another process may have written the file in the meantime.
            found = load_arrays(path, 'labels') or [_find_labels(data_source, label, path, title)]
    return found[0]


def _find_labels(data_source, label, path: Path, title: str) -> np.ndarray:
    labels, done = np.empty(len(data_source), np.int32), 0
    resumable = Resumable(path)
    found = resumable.load('labels')
    if found is not None:
        done = len(found[0])
        labels[:done] = found[0]
    with tqdm(
        total=len(labels),
        initial=done,
        desc=f'labels of {title}',
        unit='image',
        disable=None if len(labels) > _CHUNK else True,
    ) as bar:
        while done < len(labels):
            chunk = range(done, min(done + _CHUNK, len(labels)))
            labels[chunk.start : chunk.stop] = [
                int(label(raw)) for raw in data_source.__getitems__(chunk)
            ]
            done = chunk.stop
            bar.update(len(chunk))
            if resumable.due:
                resumable.save(labels=labels[:done])
    resumable.finish(labels=labels)
    return labels
