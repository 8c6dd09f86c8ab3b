"""Decoding on the host: encoded bytes to square uint8 RGB images, in no more detail than needed."""

import contextlib
import importlib.util
import struct
from functools import cache
from types import ModuleType

import numpy as np
import simplejpeg

from xmixup_jax.errors import DataError

MAX_PIXELS = 2**27
MAX_BYTES = 4 * MAX_PIXELS
# A progressive JPEG goes over all its pixels once a scan, and a scan may be a few bytes: so many
# pixels times scans take some seconds.
_MAX_SCANNED = 2**30
# Below this ratio linear interpolation shows no aliasing, at a fifth of the cost.
_LINEAR_BELOW = 1.25
_JPEG = b'\xff\xd8'
_SCAN = b'\xff\xda'
_PNG = b'\x89PNG\r\n\x1a\n'
_ANIMATION = (b'acTL', b'fcTL', b'fdAT')
_EXIF_WITHIN = 2**16
# Formats that photographs come in, by what they need beyond OpenCV: a feature of Pillow or a package.
_SUFFIXES = (
    '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.bmp', '.dib', '.gif', '.webp',
    '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm', '.tga',
)  # fmt: skip
_JPEG_2000_SUFFIXES = ('.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx')
_AVIF_SUFFIXES = ('.avif',)
_HEIF_SUFFIXES = ('.heic', '.heif', '.hif')


@cache
def _cv2() -> ModuleType:
    """OpenCV. Whoever only opens data sets need not wait for its import."""
    import cv2

    # The loader has threads of its own; OpenCV's would only contend with them.
    cv2.setNumThreads(0)
    return cv2


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the photographs that the installed libraries read.

    Returns:
      lower case, with the dot: '.jpg', '.jfif', '.png', ...; '.jp2' and '.avif' where Pillow was
      built with them, '.heic' where the package pillow_heif is installed.
    """
    from PIL import features

    found = set(_SUFFIXES)
    for suffixes, there in (
        (_JPEG_2000_SUFFIXES, features.check('jpg_2000')),
        (_AVIF_SUFFIXES, features.check('avif')),
        (_HEIF_SUFFIXES, importlib.util.find_spec('pillow_heif') is not None),
    ):
        found.update(suffixes if there else ())
    return frozenset(found)


def missing_package(suffix: str) -> str | None:
    """The package without which files of this suffix, '.heic' say, cannot be read.

    Returns:
      its name for pip; None if the files are read, or are no photographs.
    """
    suffix = suffix.lower()
    if suffix in image_suffixes():
        return None
    if suffix in _HEIF_SUFFIXES:
        return 'pillow-heif'
    return 'pillow' if suffix in (*_JPEG_2000_SUFFIXES, *_AVIF_SUFFIXES) else None


def decode(encoded: bytes, size: int, where: str) -> np.ndarray:
    """Decodes one image, scales its short side to `size` and cuts the middle square.

    JPEGs are decoded at the smallest of libjpeg's scales (eighths) that is not below `size`.

    Args:
      encoded: the bytes of an image file in any format that OpenCV reads. Grey-scale, palette,
        CMYK and 16-bit images become 8-bit RGB, alpha is dropped, EXIF orientation is applied, of
        an animation the first picture is taken.
      size: side of the result in px.
      where: names the record in an error.

    Returns:
      uint8 [size, size, 3], RGB.

    Raises:
      DataError: the bytes are no image, a part of one, one of more than 2**27 pixels, or one made
        to take long.
    """
    image = None
    whole = _checked(encoded) if 0 < len(encoded) < MAX_BYTES else None
    if whole is not None:
        # OpenCV raises for some damage and returns None for other; both are reported below.
        with contextlib.suppress(_cv2().error):
            image = _decode_jpeg(whole, size) if whole.startswith(_JPEG) else _decode(whole)
    if image is None:
        raise DataError(
            f'{where} is not an image that can be decoded ({len(encoded)} bytes; damaged, cut '
            'short, or too large): replace or remove it'
        )
    return middle_square(image, size)


def middle_square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of uint8 [H, W, 3], scaled to [size, size, 3]."""
    height, width = image.shape[:2]
    short = min(height, width)
    # Cutting before scaling costs less than the other way round, and gives the same square.
    top, left = (height - short) // 2, (width - short) // 2
    image = image[top : top + short, left : left + short]
    if short != size:
        cv2, linear = _cv2(), short < _LINEAR_BELOW * size
        interpolation = cv2.INTER_LINEAR if linear else cv2.INTER_AREA
        image = cv2.resize(image, (size, size), interpolation=interpolation)
    return np.ascontiguousarray(image)


def _decode(encoded: bytes, flags: str = 'IMREAD_COLOR_RGB') -> np.ndarray | None:
    cv2 = _cv2()
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), getattr(cv2, flags))


def _decode_jpeg(encoded: bytes, size: int) -> np.ndarray | None:
    with contextlib.suppress(ValueError):  # what it warns of, OpenCV may decode all the same
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        if height * width > min(MAX_PIXELS, _MAX_SCANNED // max(1, encoded.count(_SCAN))):
            return None
        if space in ('YCbCr', 'Gray', 'RGB') and b'Exif' not in encoded[:_EXIF_WITHIN]:
            return simplejpeg.decode_jpeg(encoded, 'RGB', min_height=size, min_width=size)
        # OpenCV knows CMYK and orientation, but fewer scales.
        for divisor in (8, 4, 2):
            if min(height, width) >= divisor * size:
                image, cv2 = _decode(encoded, f'IMREAD_REDUCED_COLOR_{divisor}'), _cv2()
                return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return _decode(encoded)


def _checked(encoded: bytes) -> bytes | None:
    """The same image in a form that OpenCV may be given; None if it is cut short."""
    if encoded.startswith(_JPEG):
        # Within the compressed picture, which begins with a scan marker, no other marker can occur.
        # Some versions of OpenCV fill up what is missing.
        return encoded if encoded.rfind(b'\xff\xd9') >= encoded.rfind(_SCAN) else None
    return _still_png(encoded) if encoded.startswith(_PNG) else encoded


def _still_png(encoded: bytes) -> bytes | None:
    """Without animation, which OpenCV 5.0 can crash on; None if a part is longer than what is left:
    OpenCV would make room for whatever length (4 GB) it claims."""
    parts, place, name = [_PNG], len(_PNG), b''
    while place + 12 <= len(encoded) and name != b'IEND':  # length, name, content, checksum
        length, name = struct.unpack_from('>I4s', encoded, place)
        if name not in _ANIMATION:
            parts.append(encoded[place : place + 12 + length])
        place += 12 + length
    if name != b'IEND' or place > len(encoded):
        return None
    return b''.join(parts)
