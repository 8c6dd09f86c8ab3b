"""Decoding on the host: encoded bytes to square uint8 RGB images, with OpenCV."""

import contextlib

import cv2
import numpy as np

from xmixup_jax.errors import DataError

# The loader has threads of its own; OpenCV's would only contend with them.
cv2.setNumThreads(0)


def decode(encoded: bytes, size: int, where: str) -> np.ndarray:
    """Decodes one image, scales its short side to `size` and cuts the middle square.

    Args:
      encoded: the bytes of an image file in any format that OpenCV reads; grey-scale and
        palette images become RGB, alpha is dropped, EXIF orientation is applied.
      size: side of the result in px.
      where: names the record in an error.

    Returns:
      uint8 [size, size, 3], RGB.

    Raises:
      DataError: the bytes are not an image.
    """
    image = None
    if encoded:
        # OpenCV raises for some damage and returns None for other; both are reported below.
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(
            f'{where} is not an image that can be decoded ({len(encoded)} bytes): '
            'replace or remove it'
        )
    height, width = image.shape[:2]
    short = min(height, width)
    # Cutting before scaling costs less than the other way round, and gives the same square.
    top, left = (height - short) // 2, (width - short) // 2
    image = image[top : top + short, left : left + short]
    if short != size:
        interpolation = cv2.INTER_AREA if short > size else cv2.INTER_LINEAR
        image = cv2.resize(image, (size, size), interpolation=interpolation)
    return np.ascontiguousarray(image)
