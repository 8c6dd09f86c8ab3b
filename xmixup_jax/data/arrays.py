"""Images in memory. They have no name in a configuration: the caller passes them to a run."""

import hashlib
from collections.abc import Sequence

import numpy as np

from xmixup_jax.data.records import Records, Store
from xmixup_jax.errors import DataError


def open_arrays(
    images: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    name: str,
) -> Records:
    """Records of images in memory, which are not copied and must not be changed afterwards.

    Like those of files, they are scaled and cut to their middle square when they are read.

    Args:
      images: uint8 [N, H, W, 3] in RGB, or grey [N, H, W]; or N of [H, W, 3] or [H, W] whose sizes
        may differ.
      labels: integers [N], 0 <= label < K.
      class_names: K different names.
      name: of the data set, for messages and titles.

    Raises:
      DataError: the arrays are of another type or shape, or do not fit together.
    """
    labels = np.asarray(labels)
    names = tuple(map(str, class_names))
    if not len(images):
        raise DataError(f'{name} has no images')
    if labels.shape != (len(images),) or labels.dtype.kind not in 'iu':
        raise DataError(
            f'labels of {name} are {labels.dtype} {list(labels.shape)}: they must be integers '
            f'[{len(images)}], one for each image'
        )
    if len(set(names)) < len(names):
        raise DataError(f'class_names of {name} has a name twice: they must differ')
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f'labels of {name} are from {labels.min()} to {labels.max()}: they must be from 0 to '
            f'{len(names) - 1}, positions in class_names'
        )
    for i, image in enumerate(images):
        _check(image, f'image {i} of {name}')
    return Records(
        name=name,
        class_names=names,
        labels=labels.astype(np.int32),
        read=lambda i: _rgb(images[i]),
        where=lambda i: f'image {i} of {name}',
        index=np.arange(len(images)),
        store=Store(max_bad_images=0),
        stamps=np.fromiter(map(_stamp, images), np.uint64, len(images)),
    )


def _check(image: np.ndarray, where: str) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = getattr(image, 'dtype', type(image).__name__)
        raise DataError(f'{where} is {found}: it must be a NumPy array of uint8, from 0 to 255')
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise DataError(
            f'{where} has the shape {list(image.shape)}: it must be [H, W, 3], or [H, W] for grey'
        )


def _stamp(image: np.ndarray) -> int:
    digest = hashlib.blake2b(f'{image.shape}'.encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest())


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
