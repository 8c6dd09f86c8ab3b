"""What folders and lists of image files share."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from xmixup_jax.data.decode import MAX_BYTES
from xmixup_jax.data.records import Records, Store


def stamp(*parts: str | int) -> int:
    """64 bits that change with any of the parts."""
    # Names of files need not be UTF-8.
    text = os.fsencode('\0'.join(map(str, parts)))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def open_files(
    name: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    files: Sequence[Path],
    stamps: Iterable[int],
    lasting: Iterable[int],
    store: Store,
    left_out: Counter[str] | None = None,
    notes: Sequence[str] = (),
) -> Records:
    """Records of one image file each.

    Args:
      name: of the data set.
      class_names: K names.
      labels: int32 [N], positions in the names.
      files: N paths.
      stamps: N numbers, see `stamp`, of everything that is known of a file.
      lasting: the same without the times, which a copy may not keep.
      store: of the records.
      left_out, notes: of the records.
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
        lasting=np.fromiter(lasting, np.uint64, len(files)),
        left_out=dict(left_out or {}),
        notes=tuple(notes),
    )


def read_file(file: Path) -> bytes:
    """Of a file too large for an image only the beginning, which cannot be decoded."""
    with file.open('rb') as opened:
        return opened.read(MAX_BYTES)
