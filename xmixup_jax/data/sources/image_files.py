"""What folders and lists of image files share."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from xmixup_jax.data.decode import MAX_BYTES
from xmixup_jax.data.records import Records, Store

UNDIVIDED_SPLITS = ('train', 'test')


def stamp(*parts: str | int) -> int:
    """64 bits that change with any of the parts."""
    # Names of files need not be UTF-8.
    text = os.fsencode('\0'.join(map(str, parts)))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def part_of(split: str, count: int, label: int, share: float) -> np.ndarray:
    """Divides the images of a class where the data set itself has no splits.

    Args:
      split: 'train' or 'test'.
      count: images of the class.
      label: number of the class, the seed of the division, which is the same in every run.
      share: of the images that are the test's, rounded; one at least is trained on.

    Returns:
      the places of the split's images among the class's, ascending.
    """
    order = np.random.default_rng(label).permutation(count)
    tested = min(round(share * count), count - 1)
    return np.sort(order[:tested] if split == 'test' else order[tested:])


def open_files(
    name: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    files: Sequence[Path],
    stamps: Iterable[int],
    store: Store,
) -> Records:
    """Records of one image file each.

    Args:
      name: of the data set.
      class_names: K names.
      labels: int32 [N], positions in the names.
      files: N paths.
      stamps: N numbers, see `stamp`.
      store: of the records.
    """
    return Records(
        name=name,
        class_names=tuple(class_names),
        labels=labels,
        read=lambda i: read_file(files[i]),
        where=lambda i: str(files[i]),
        index=np.arange(len(files)),
        store=store,
        stamps=np.fromiter(stamps, np.uint64, len(files)),
    )


def read_file(file: Path) -> bytes:
    """Of a file too large for an image only the beginning, which cannot be decoded."""
    with file.open('rb') as opened:
        return opened.read(MAX_BYTES)
