"""Finds the images below a folder, and counts the files that it leaves out."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from xmixup_jax.data.decode import image_suffixes, missing_package

HIDDEN = 'hidden or system'
_SYSTEM = {
    '__macosx',
    'thumbs.db',
    'ehthumbs.db',
    'desktop.ini',
    'icon\r',
    '@eadir',
    '#recycle',
    '$recycle.bin',
    'system volume information',
    'lost+found',
    'found.000',
    'recycler',
    'network trash folder',
    'temporary items',
    '@recycle',
    '@tmp',
    '#snapshot',
    '~snapshot',
    '__pycache__',
}
# Magic bytes of common formats, for files without a suffix.
_MAGIC_BYTES = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF8', b'II*\0', b'MM\0*')


class Image(NamedTuple):
    """An image file."""

    path: str
    name: str
    """Path below the class folder (for a list: below the common folder of all files), with '/', in
    Unicode form NFC."""
    size: int
    """Bytes."""
    mtime_ns: int


class Found(NamedTuple):
    """The files in a folder."""

    images: list[Image]
    """Sorted by name."""
    left_out: Counter[str]
    """Counts of other files by kind, for messages: '.txt', HIDDEN, ..."""

    @property
    def nested(self) -> int:
        """The number of images in sub-folders."""
        return sum('/' in image.name for image in self.images)


def is_system(name: str) -> bool:
    """Whether a file or folder is never data: hidden, or created by an operating system.

    >>> [is_system(name) for name in ('.DS_Store', '._photo.jpg', 'Thumbs.db', 'photo.jpg')]
    [True, True, True, False]
    """
    return name.startswith(('.', '~$')) or name.casefold() in _SYSTEM


def nfc(name: str) -> str:
    """Normalises a name to Unicode form NFC: macOS stores names in another form than is typed."""
    return unicodedata.normalize('NFC', name)


def subfolders(folder: Path) -> list[Path]:
    """Lists the sub-folders that may be data, sorted by name."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_system(entry.name)]
    return [folder / name for name in sorted(names, key=nfc)]


def find_images(folder: Path) -> Found:
    """Finds the images in a folder and its sub-folders, at any depth. Follows links."""
    found = Found([], Counter())
    above = {_inode(parent) for parent in folder.absolute().parents}
    _walk(folder, '', found, above)
    found.images.sort(key=lambda image: image.name)
    return found


def has_images(folder: Path) -> bool:
    """Whether a folder directly contains images."""
    with os.scandir(folder) as entries:
        return any(
            not is_system(entry.name) and entry.is_file() and not kind_of(entry)
            for entry in entries
        )


def count_outside_classes(folder: Path) -> Counter[str]:
    """Counts the files beside the class folders in a folder, by kind."""
    left_out: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system(entry.name):
                left_out[HIDDEN] += 1
            elif entry.is_file():
                left_out[kind_of(entry) or 'image outside the class folders'] += 1
    return left_out


def _inode(folder: Path) -> tuple[int, int]:
    own = os.stat(folder)  # noqa: PTH116  (fast: there may be a million folders)
    return own.st_dev, own.st_ino


def _walk(folder: Path, prefix: str, found: Found, above: set[tuple[int, int]]) -> None:
    inode = _inode(folder)
    if inode in above:
        found.left_out['link to a folder above'] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system(entry.name):
                found.left_out[HIDDEN] += 1
            elif entry.is_dir():
                _walk(Path(entry.path), f'{prefix}{entry.name}/', found, above | {inode})
            elif not entry.is_file():  # reading a pipe would block forever
                kind = 'broken link' if entry.is_symlink() else 'pipe or device'
                found.left_out[kind] += 1
            elif kind := kind_of(entry):
                found.left_out[kind] += 1
            else:
                file = entry.stat()
                name = nfc(prefix + entry.name)
                found.images.append(Image(entry.path, name, file.st_size, file.st_mtime_ns))


def kind_of(entry: os.DirEntry) -> str:
    """Names a file's kind, for messages; '' if it is an image that can be read."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  (faster than Path)
    if suffix in image_suffixes():
        return ''
    if not suffix:
        return '' if _starts_like_image(entry.path) else 'no suffix'
    package = missing_package(suffix)
    return f'{suffix} (pip install {package})' if package else suffix


def _starts_like_image(path: str) -> bool:
    with open(path, 'rb') as file:  # noqa: PTH123
        start = file.read(16)
    return start.startswith(_MAGIC_BYTES) or (start[:4], start[8:12]) == (b'RIFF', b'WEBP')


def format_counts(left_out: Counter[str]) -> str:
    """Formats counts by kind as text, the most frequent first.

    >>> format_counts(Counter({'.txt': 2, HIDDEN: 5}))
    '5 hidden or system, 2 .txt'
    """
    return ', '.join(f'{count} {kind}' for kind, count in left_out.most_common())


def total(parts: Iterable[Found]) -> Counter[str]:
    """Adds up the files that were left out."""
    return sum((part.left_out for part in parts), Counter())
