"""Images in memory: they are checked, identified by their pixels, and made RGB."""

import hashlib
from collections.abc import Sequence

import numpy as np

from xmixup_jax.errors import DataError


def check(
    images: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    name: str,
) -> None:
    """Checks what `Records.from_arrays` is given.

    Raises:
      DataError: the arrays are of another type or shape, or do not fit together.
    """
    if not len(images):
        raise DataError(f'{name} has no images')
    if labels.shape != (len(images),) or labels.dtype.kind not in 'iu':
        raise DataError(
            f'labels of {name} are {labels.dtype} {list(labels.shape)}: they must be integers '
            f'[{len(images)}], one for each image'
        )
    if len(set(class_names)) < len(class_names):
        raise DataError(f'class_names of {name} has a name twice: they must differ')
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(
            f'labels of {name} are from {labels.min()} to {labels.max()}: they must be from 0 to '
            f'{len(class_names) - 1}, positions in class_names'
        )
    for i, image in enumerate(images):
        _check(image, f'image {i} of {name}')


def _check(image: np.ndarray, where: str) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = getattr(image, 'dtype', type(image).__name__)
        raise DataError(f'{where} is {found}: it must be a NumPy array of uint8, from 0 to 255')
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise DataError(
            f'{where} has the shape {list(image.shape)}: it must be [H, W, 3], or [H, W] for grey'
        )


def stamp(image: np.ndarray) -> int:
    """A hash of size and pixels, below 2**64."""
    digest = hashlib.blake2b(f'{image.shape}'.encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest())


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an RGB or grey image."""
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
