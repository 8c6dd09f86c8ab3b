"""What folders and lists of image files share."""

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

_WHOLE = 2**28  # bytes of a split
_MOST_FILES = 100_000
_END = 2**12  # bytes


def stamp(*parts: str | int) -> int:
    """64 bits that change with any of the parts."""
    # Names of files need not be UTF-8.
    text = os.fsencode('\0'.join(map(str, parts)))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def fingerprints(images: Sequence[Image]) -> list[str]:
    """A hash of the content of each file.

    Of all of it where the files have 256 MB or less together, else of both ends. '' for a file that
    cannot be read, and for all of more than 100,000, which would take too long to open.
    """
    if len(images) > _MOST_FILES:
        return [''] * len(images)
    whole = sum(image.size for image in images) <= _WHOLE

    def of_file(image: Image) -> str:
        try:
            with open(image.path, 'rb') as file:  # noqa: PTH123
                if whole or image.size <= 2 * _END:
                    content = file.read()
                else:
                    content = file.read(_END)
                    file.seek(-_END, os.SEEK_END)
                    content += file.read()
        except OSError:  # whoever needs the image says so
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
    """Records of one image file each.

    Args:
      name: of the data set.
      class_names: K names.
      labels: int32 [N], positions in the names.
      images: N files.
      store: of the records.
      left_out, notes, doubts: of the records; the notes without the doubts.
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
    """Of a file too large for an image only the beginning, which cannot be decoded."""
    with file.open('rb') as opened:
        return opened.read(MAX_BYTES)
