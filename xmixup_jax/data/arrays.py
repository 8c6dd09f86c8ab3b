"""Images in memory: checks them, hashes their pixels and converts them to RGB."""

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
    """Checks the arguments of `Records.from_arrays`.

    Args:
      images: uint8 [N, H, W, 3] or [N, H, W]; or N images [H, W, 3] or [H, W].
      labels: integers [N], 0 <= label < K.
      class_names: K distinct names.
      name: name of the data set, for the error message.

    Raises:
      DataError: an array has the wrong type or shape, or they do not fit together.
    """
    if not len(images):
        raise DataError(f'{name} has no images')
    if labels.shape != (len(images),) or labels.dtype.kind not in 'iu':
        raise DataError(
            f'labels of {name} are {labels.dtype} {list(labels.shape)}: they must be integers '
            f'[{len(images)}], one per image'
        )
    if len(set(class_names)) < len(class_names):
        raise DataError(f'class_names of {name} contains a name twice: names must be distinct')
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(
            f'labels of {name} range from {labels.min()} to {labels.max()}: they must be indices '
            f'into class_names, from 0 to {len(class_names) - 1}'
        )
    for i, image in enumerate(images):
        _check(image, f'image {i} of {name}')


def _check(image: np.ndarray, where: str) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = getattr(image, 'dtype', type(image).__name__)
        raise DataError(f'{where} is {found}: it must be a NumPy array of uint8, from 0 to 255')
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise DataError(
            f'{where} has shape {list(image.shape)}: it must be [H, W, 3], or [H, W] for grey-scale'
        )


def stamp(image: np.ndarray) -> int:
    """Returns a 64-bit hash of an image's shape and pixels."""
    digest = hashlib.blake2b(f'{image.shape}'.encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest())


def rgb(image: np.ndarray) -> np.ndarray:
    """Converts an RGB [H, W, 3] or grey-scale [H, W] image to [H, W, 3]; uint8."""
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
