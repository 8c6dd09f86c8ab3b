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
      encoded: the bytes of an image file in any format that OpenCV reads. Grey-scale, palette,
        CMYK and 16-bit images become 8-bit RGB, alpha is dropped, EXIF orientation is applied, of
        an animation the first picture is taken.
      size: side of the result in px.
      where: names the record in an error.

    Returns:
      uint8 [size, size, 3], RGB.

    Raises:
      DataError: the bytes are no image, a part of one, or one of more than 2**27 pixels.
    """
    image = None
    if encoded and not _cut_short(encoded):
        # OpenCV raises for some damage and returns None for other; both are reported below.
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(
            f'{where} is not an image that can be decoded ({len(encoded)} bytes; damaged, cut '
            'short, or too large): replace or remove it'
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


def _cut_short(encoded: bytes) -> bool:
    """Whether a JPEG ends before its end marker; some versions of OpenCV fill up such images."""
    if not encoded.startswith(b'\xff\xd8'):
        return False
    # Within the compressed picture, which begins with a scan marker, no other marker can occur.
    return encoded.rfind(b'\xff\xd9') < encoded.rfind(b'\xff\xda')
