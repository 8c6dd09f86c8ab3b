"""Decodes image files to square uint8 RGB images on the host, at no more detail than needed."""

import contextlib
import importlib.util
import io
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg

from xmixup_jax.data import headers
from xmixup_jax.errors import DataError, first_line

MAX_PIXELS = 2**27
MAX_BYTES = 4 * MAX_PIXELS
FITS = ('crop', 'pad', 'squash')
"""Ways to make an image square; see `square`."""
# Each scan of a progressive JPEG touches all pixels, and a scan may be only a few bytes long. This
# many pixels times scans take a few seconds to decode.
_MAX_SCANNED = 2**30
# Up to this reduction, linear interpolation shows no aliasing and costs a fifth of area averaging.
_LINEAR_BELOW = 1.25
# Suffixes of photographs, by what reading them needs: nothing more, an optional part of Pillow, or
# another package.
_SUFFIXES = (
    '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.bmp', '.dib', '.gif', '.webp',
    '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm', '.tga',
)  # fmt: skip
_JPEG_2000_SUFFIXES = ('.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx')
_AVIF_SUFFIXES = ('.avif',)
_HEIF_SUFFIXES = ('.heic', '.heif', '.hif')
# Formats that Pillow must not open. JPEG and PNG are left to OpenCV: files that it rejects are
# corrupted. PostScript is a program, which Pillow would run with Ghostscript. Of the others Pillow
# reads only the header, or needs Windows.
_NOT_FOR_PILLOW = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'JPEG', 'MPEG', 'PNG', 'WMF'}
_WITH_8_BITS = 'save it with 8 or 16 bits, with 0 as black'
_LIMIT = f'more than {MAX_PIXELS / 10**6:.0f} million pixels'


class _Refused(Exception):
    """Why an image is refused, and how to fix that."""

    def __init__(self, why: str, remedy: str = 'replace or remove it'):
        self.why, self.remedy = why, remedy


@cache
def _cv2() -> ModuleType:
    """Imports OpenCV on first use: opening a data set does not need it."""
    import cv2

    # The loader has its own threads; OpenCV's would only compete with them.
    cv2.setNumThreads(0)
    return cv2


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of image files that the installed libraries can read.

    Returns:
      lower case, with the dot: '.jpg', '.jfif', '.png', ...; '.jp2' and '.avif' if Pillow was built
      with them, '.heic' if the package pillow_heif is installed.
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
    """Names the package that is missing to read files with a suffix such as '.heic'.

    Returns:
      its name for pip; None if such files can be read, or are not photographs.
    """
    suffix = suffix.lower()
    if suffix in image_suffixes():
        return None
    if suffix in _HEIF_SUFFIXES:
        return 'pillow-heif'
    return 'pillow' if suffix in (*_JPEG_2000_SUFFIXES, *_AVIF_SUFFIXES) else None


def decode(encoded: bytes, size: int, where: str, fit: str = 'crop') -> np.ndarray:
    """Decodes one image and makes it square; see `square`.

    JPEGs are decoded at libjpeg's smallest scale (in eighths) that is not below the square's size.
    If a file holds several images, or a video after the image, the first image is decoded.

    Args:
      encoded: the bytes of an image file in any format that OpenCV or Pillow reads. Grey-scale,
        palette, CMYK and 16-bit images become 8-bit RGB, alpha is dropped, the EXIF orientation is
        applied, and only the first frame of an animation is decoded.
      size: side of the result in px.
      where: names the record in errors.
      fit: one of `FITS`.

    Returns:
      uint8 [size, size, 3], RGB.

    Raises:
      DataError: the bytes are not an image, or only a part of one; the image has more than 2**27
        pixels, or is built to take long to decode; its values have no known scale (floats, 32-bit
        integers); or a package for its format is missing.
    """
    try:
        return square(_pixels(encoded, size, fit), size, fit)
    except _Refused as error:
        raise DataError(
            f'{where} is not an image that can be decoded ({len(encoded)} bytes; {error.why}): '
            f'{error.remedy}'
        ) from None


def square(image: np.ndarray, size: int, fit: str = 'crop') -> np.ndarray:
    """Makes an image square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in px.
      fit: 'crop' scales the short side to `size` and crops the centre; 'pad' scales the long side
        to `size` and pads both sides with black (whatever the network's mean colour, so that all
        networks can share decoded images); 'squash' scales each side to `size`.

    Returns:
      uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    if fit == 'pad':
        long = max(height, width)
        height, width = (max(1, round(size * side / long)) for side in (height, width))
        top, left = round((size - height) / 2), round((size - width) / 2)
        padded = np.zeros((size, size, 3), np.uint8)
        padded[top : top + height, left : left + width] = _scaled(image, height, width)
        return padded
    if fit == 'crop':
        # Cropping before scaling is cheaper, and gives the same square.
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        image = image[top : top + short, left : left + short]
    return np.ascontiguousarray(_scaled(image, size, size))


def _scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes to [height, width, 3]: by area averaging if an axis shrinks a lot, else linearly."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    cv2 = _cv2()
    rows, columns = old_height >= _LINEAR_BELOW * height, old_width >= _LINEAR_BELOW * width
    if rows != columns:  # OpenCV uses one interpolation for both axes
        between = (width, old_height) if columns else (old_width, height)
        image = cv2.resize(image, between, interpolation=cv2.INTER_AREA)
    areas = rows and columns
    interpolation = cv2.INTER_AREA if areas else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and mirrors an image [H, W, ...] by its Exif orientation, from 1 to 8."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return image[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def rgb(image: Any) -> np.ndarray:
    """Converts a Pillow image of any mode to uint8 [H, W, 3], with its EXIF orientation applied.

    Raises:
      DataError: it cannot be read, is too large, or the scale of its values is unknown.
    """
    try:
        if image.width * image.height > MAX_PIXELS:
            raise _Refused(f'too large, {_LIMIT}')
        return _pillow_rgb(image)
    except _Refused as error:
        raise DataError(f'a Pillow image is refused ({error.why}): {error.remedy}') from None
    except Exception as error:  # Pillow's decoders raise errors without a common class
        raise DataError(f'a Pillow image cannot be read: {first_line(error)}') from error


def _pixels(encoded: bytes, size: int, fit: str) -> np.ndarray:
    """Decodes to upright uint8 [H, W, 3], in at least the detail that the square needs."""
    if len(encoded) >= MAX_BYTES:
        raise _Refused('too large')
    image = None
    # OpenCV raises for some corrupted files and returns None for others; both are reported below.
    with contextlib.suppress(_cv2().error):
        if encoded.startswith(headers.JPEG):
            image = _decode_jpeg(encoded, size, fit)
        elif encoded.startswith(headers.PNG):
            image = _decode_png(encoded)
        else:
            image = _decode_other(encoded)
    if image is None:
        raise _Refused(_reason(encoded))
    return image


def _decode(encoded: bytes, flags: str = 'IMREAD_COLOR_RGB') -> np.ndarray | None:
    """Decodes with OpenCV, ignoring the orientation (which OpenCV always applies for TIFFs)."""
    cv2 = _cv2()
    as_stored = getattr(cv2, flags) | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), as_stored)


def _decode_jpeg(encoded: bytes, size: int, fit: str) -> np.ndarray | None:
    # Checked first: some versions of OpenCV fill in what a truncated file lacks.
    if (jpeg := headers.first_jpeg(encoded)) is None:
        return None
    image = _stored_jpeg(jpeg, size, fit)
    return image if image is None else upright(image, headers.orientation(jpeg.exif))


def _stored_jpeg(jpeg: headers.Jpeg, size: int, fit: str) -> np.ndarray | None:
    with contextlib.suppress(ValueError):  # simplejpeg raises on warnings; OpenCV may still decode
        height, width, space, _ = simplejpeg.decode_jpeg_header(jpeg.content)
        if height * width > min(MAX_PIXELS, _MAX_SCANNED // max(1, jpeg.scans)):
            return None
        if space in ('YCbCr', 'Gray', 'RGB') and not jpeg.exif:
            return simplejpeg.decode_jpeg(
                jpeg.content,
                'RGB',
                min_height=0 if fit == 'pad' and height < width else size,
                min_width=0 if fit == 'pad' and width < height else size,
            )
        # OpenCV decodes CMYK, but at fewer scales.
        side = max(height, width) if fit == 'pad' else min(height, width)
        for divisor in (8, 4, 2):
            if side >= divisor * size:
                image, cv2 = _decode(jpeg.content, f'IMREAD_REDUCED_COLOR_{divisor}'), _cv2()
                return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return _decode(jpeg.content)


def _decode_png(encoded: bytes) -> np.ndarray | None:
    if (png := headers.still_png(encoded)) is None:
        return None
    image = _decode(png.content)
    return image if image is None else upright(image, headers.orientation(png.exif))


def _decode_other(encoded: bytes) -> np.ndarray | None:
    """Decodes with OpenCV, or with Pillow if OpenCV does not know the format."""
    kind = headers.kind(encoded)
    if kind in headers.NOT_PHOTOGRAPHS:
        return None
    _check_readable(kind)
    if values := headers.unscaled_values(encoded):
        raise _Refused(f'{values} values, whose scale is unknown', _WITH_8_BITS)
    image = None
    if kind not in (headers.AVIF, headers.HEIF):  # some builds of OpenCV read and rotate AVIF
        with contextlib.suppress(_cv2().error):
            image = _decode(encoded)
    if image is None:
        return _by_pillow(encoded)
    exif = headers.webp_exif(encoded) if kind == headers.WEBP else b''
    return upright(image, headers.orientation(exif))


def _check_readable(kind: str) -> None:
    """Raises _Refused if a package is missing for this kind of file."""
    suffix = {headers.AVIF: '.avif', headers.HEIF: '.heic', headers.JPEG_2000: '.jp2'}.get(kind, '')
    if package := missing_package(suffix):
        again = 'run  pip install --upgrade --force-reinstall pillow  to read it'
        install = f'run  pip install {package}  to read it'
        raise _Refused(kind, f'{again if package == "pillow" else install}, or convert it to JPEG')
    if kind == headers.HEIF:
        _register_heif()


@cache
def _pillow() -> ModuleType:
    from PIL import Image

    # Pillow already warns below our limit of pixels; its own limit is above ours.
    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
    Image.init()
    return Image


@cache
def _register_heif() -> None:
    """Lets Pillow read HEIC."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def _by_pillow(encoded: bytes) -> np.ndarray | None:
    formats = sorted(set(_pillow().OPEN) - _NOT_FOR_PILLOW)
    try:
        with _pillow().open(io.BytesIO(encoded), formats=formats) as image:
            return None if image.width * image.height > MAX_PIXELS else _pillow_rgb(image)
    except _Refused:
        raise
    except Exception:  # Pillow's decoders raise errors without a common class
        return None


def _pillow_rgb(image: Any) -> np.ndarray:
    from PIL import ImageOps

    if image.mode in ('F', 'I'):
        kind = 'float' if image.mode == 'F' else 'integer'
        raise _Refused(f'32-bit {kind} values, whose scale is unknown', _WITH_8_BITS)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):  # `convert` would clip the values
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert('RGB'))


def _reason(encoded: bytes) -> str:
    """Says why an image cannot be decoded, as far as we can tell."""
    if (kind := headers.kind(encoded)) in headers.NOT_PHOTOGRAPHS:
        return kind
    try:
        with _pillow().open(io.BytesIO(encoded)) as image:
            pixels = image.width * image.height
    except _pillow().DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception:  # as above
        pixels = 0
    if pixels > MAX_PIXELS:
        return f'too large, {_LIMIT}'
    return 'corrupted, truncated or too large'
