"""Image folders, `folder:PATH`: PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE, divided at random."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources.image_files import UNDIVIDED_SPLITS, open_files, part_of, stamp
from xmixup_jax.errors import DataError

IMAGE_SUFFIXES = (
    '.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif'
)  # fmt: skip


class Image(NamedTuple):
    """A file, and a hash of what it is; see `Records.stamps`."""

    path: Path
    stamp: int


def problem(what: str, config: ConfigDict) -> str | None:
    """Says so if the folder does not exist."""
    path = Path(what).expanduser()
    if path.is_dir():
        return None
    return (
        f'image folder {path} does not exist: it should hold SPLIT/CLASS/FILE or CLASS/FILE; '
        'name another with folder:PATH'
    )


def prepare(what: str, config: ConfigDict) -> None:
    """A folder needs no preparation."""


def open(what: str, dataset: ConfigDict, split: str, config: ConfigDict, store: Store) -> Records:
    """Opens one split.

    Without split folders there are the splits 'train' and 'test': `dataset.test_share` of each
    class's images, rounded, are the test's, the same in every run whatever its seed.

    Raises:
      DataError: there is no such split, or a class without images.
    """
    root = Path(what).expanduser()
    if (root / split).is_dir():
        return _records(dataset.name, class_images(root / split), store)
    present = sorted(path.name for path in root.iterdir() if path.is_dir())
    undivided = any(_images(root / name) for name in present)
    if not undivided or split not in UNDIVIDED_SPLITS:
        has = ', '.join(UNDIVIDED_SPLITS if undivided else present) or 'none'
        raise DataError(f'{root} has no split {split!r}: it has {has}')
    chosen = {}
    for label, (folder, images) in enumerate(class_images(root).items()):
        part = part_of(split, len(images), label, dataset.test_share)
        chosen[folder] = [images[i] for i in part]
    return _records(dataset.name, chosen, store)


def class_images(root: Path) -> dict[Path, list[Image]]:
    """The images of each class folder.

    Raises:
      DataError: a class has none.
    """
    classes = {path: _images(path) for path in sorted(root.iterdir()) if path.is_dir()}
    for folder, images in classes.items():
        if not images:
            raise DataError(f'class folder {folder} holds no images: fill or remove it')
    return classes


def _images(folder: Path) -> list[Image]:
    with os.scandir(folder) as entries:
        # Regular files alone: reading a pipe would wait for ever.
        found = [entry for entry in entries if entry.is_file() and _is_image(entry.name)]
        found.sort(key=lambda entry: entry.name)
        return [Image(folder / entry.name, _stamp(folder, entry)) for entry in found]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  (faster than Path)


def _stamp(folder: Path, entry: os.DirEntry) -> int:
    file = entry.stat()
    return stamp(folder.name, entry.name, file.st_size, file.st_mtime_ns)


def _records(name: str, classes: dict[Path, list[Image]], store: Store) -> Records:
    images = [image for class_images in classes.values() for image in class_images]
    counts = [len(class_images) for class_images in classes.values()]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    names = [folder.name for folder in classes]
    files = [image.path for image in images]
    return open_files(name, names, labels, files, (image.stamp for image in images), store)
