"""Records of image files, for folders and lists alike."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from xmixup_jax.data.decode import MAX_BYTES
from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.sources.listing import Image

_MAX_BYTES_HASHED = 2**28  # of a split, beyond which only the ends of each file are hashed
_MAX_FILES_HASHED = 100_000
_END_BYTES = 2**12  # at each end of a file


def stamp(*parts: str | int) -> int:
    """Returns a 64-bit hash of the parts."""
    # File names need not be valid UTF-8.
    text = os.fsencode('\0'.join(map(str, parts)))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def fingerprints(images: Sequence[Image]) -> list[str]:
    """Hashes the content of each file.

    Files of up to 256 MB in total are hashed completely, larger sets only at both ends of each
    file.

    Returns:
      hexadecimal digits for each file; '' for a file that cannot be read, and for all files if
      there are more than 100,000, which would take too long to open.
    """
    if len(images) > _MAX_FILES_HASHED:
        return [''] * len(images)
    whole = sum(image.size for image in images) <= _MAX_BYTES_HASHED

    def of_file(image: Image) -> str:
        try:
            with open(image.path, 'rb') as file:  # noqa: PTH123
                if whole or image.size <= 2 * _END_BYTES:
                    content = file.read()
                else:
                    content = file.read(_END_BYTES)
                    file.seek(-_END_BYTES, os.SEEK_END)
                    content += file.read()
        except OSError:  # reported when the image is read
            return ''
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(of_file, images))


def open_files(
    name: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    images: Sequence[Image],
    store: Store,
    left_out: Counter[str] | None = None,
    notes: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Records:
    """Makes records of image files, one image each.

    Args:
      name: name of the data set.
      class_names: K names.
      labels: int32 [N], positions in `class_names`.
      images: N files.
      store: store of the records.
      left_out, notes, doubts: as in `Records`, but with notes that do not include the doubts.
    """
    files = [Path(image.path) for image in images]
    known = [
        (class_names[label], image.name, image.size, content)
        for label, image, content in zip(labels, images, fingerprints(images), strict=True)
    ]
    exact = (stamp(*words, i.mtime_ns) for words, i in zip(known, images, strict=True))
    return Records(
        name=name,
        class_names=tuple(class_names),
        labels=labels,
        read=lambda i: read_file(files[i]),
        where=lambda i: str(files[i]),
        index=np.arange(len(files)),
        store=store,
        stamps=np.fromiter(exact, np.uint64, len(files)),
        lasting=np.fromiter((stamp(*words) for words in known), np.uint64, len(files)),
        left_out=dict(left_out or {}),
        notes=(*notes, *doubts),
        doubts=tuple(doubts),
    )


def read_file(file: Path) -> bytes:
    """Reads a file, up to MAX_BYTES: a file of that size is refused when it is decoded."""
    with file.open('rb') as opened:
        return opened.read(MAX_BYTES)
