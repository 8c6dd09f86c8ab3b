"""Image folders: PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE, which is divided at random."""

import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.data.decode import MAX_BYTES
from xmixup_jax.data.records import Records, Store
from xmixup_jax.errors import DataError

FOLDER = 'folder:'
IMAGE_SUFFIXES = (
    '.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif'
)  # fmt: skip


def folder_path(name: str) -> Path:
    """The folder that `folder:PATH` names."""
    return Path(name.removeprefix(FOLDER)).expanduser()


def open_folder(dataset: ConfigDict, split: str, store: Store) -> Records:
    """Opens one split of the image folder `dataset.name`.

    Without split folders there are the splits 'train' and 'test': `dataset.test_share` of each
    class's images, rounded, are the test's, the same in every run whatever its seed.

    Raises:
      DataError: there is no such split, or a class without images.
    """
    root = folder_path(dataset.name)
    if (root / split).is_dir():
        return _records(dataset.name, _class_files(root / split), store)
    present = sorted(path.name for path in root.iterdir() if path.is_dir())
    undivided = any(_images(root / name) for name in present)
    if not undivided or split not in ('train', 'test'):
        has = ', '.join(('train', 'test') if undivided else present) or 'none'
        raise DataError(f'{root} has no split {split!r}: it has {has}')
    chosen = {}
    for label, (folder, files) in enumerate(_class_files(root).items()):
        order = np.random.default_rng(label).permutation(len(files))
        count = min(round(dataset.test_share * len(files)), len(files) - 1)
        part = order[:count] if split == 'test' else order[count:]
        chosen[folder] = [files[i] for i in np.sort(part)]
    return _records(dataset.name, chosen, store)


def _images(folder: Path) -> list[Path]:
    # Regular files alone: reading a pipe would wait for ever.
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return sorted(folder / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _read(file: Path) -> bytes:
    """Of a file too large for an image only the beginning, which cannot be decoded."""
    with file.open('rb') as opened:
        return opened.read(MAX_BYTES)


def _class_files(root: Path) -> dict[Path, list[Path]]:
    """The images of each class folder."""
    classes = {path: _images(path) for path in sorted(root.iterdir()) if path.is_dir()}
    for folder, files in classes.items():
        if not files:
            raise DataError(f'class folder {folder} holds no images: fill or remove it')
    return classes


def _records(name: str, classes: dict[Path, list[Path]], store: Store) -> Records:
    files = [file for class_files in classes.values() for file in class_files]
    counts = [len(class_files) for class_files in classes.values()]
    return Records(
        name=name,
        class_names=tuple(folder.name for folder in classes),
        labels=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        read=lambda i: _read(files[i]),
        where=lambda i: str(files[i]),
        index=np.arange(len(files)),
        store=store,
        stamp=lambda i: '{0.st_size} {0.st_mtime_ns}'.format(files[i].stat()),
    )
