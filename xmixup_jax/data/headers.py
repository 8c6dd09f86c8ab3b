"""Reads the headers of image files without decoding them."""

import re
import struct
from typing import NamedTuple

JPEG = b'\xff\xd8'
PNG = b'\x89PNG\r\n\x1a\n'

# A JPEG marker, except those without content: stuffing, restarts, fill bytes.
_MARKER = re.compile(rb'\xff([\x02-\xcf\xd8-\xfe])')
_END, _SCAN, _APP1 = 0xD9, 0xDA, 0xE1
# Markers allowed between scans: tables, the number of lines, application data and comments. Any
# other one is a corrupted byte of the compressed image.
_BETWEEN_SCANS = {0xC4, 0xCC, _SCAN, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_EXIF = b'Exif\0\0'
_ANIMATION = (b'acTL', b'fcTL', b'fdAT')
_SUBFILE, _BITS, _ORIENTATION, _SAMPLE_FORMAT = 254, 258, 274, 339
_TIFF_NUMBERS = {1: 'B', 3: 'H', 4: 'I', 16: 'Q'}


class Jpeg(NamedTuple):
    """The first image in a JPEG file."""

    content: bytes
    """The image's bytes, without anything that follows: a video, further images, padding."""
    scans: int
    exif: bytes
    """A TIFF header with its fields; b'' if there is none."""


def first_jpeg(encoded: bytes) -> Jpeg | None:
    """Finds the first image in a JPEG file by following its segments (ITU-T T.81, annex B).

    Returns:
      the image; None if it is truncated.
    """
    place, scans, exif = len(JPEG), 0, b''
    while found := _MARKER.search(encoded, place):
        marker, place = found[1][0], found.end()
        if marker == _END:
            return Jpeg(encoded[:place], scans, exif) if scans else None
        if scans and marker not in _BETWEEN_SCANS:
            continue
        length = int.from_bytes(encoded[place : place + 2])
        if length < 2 or place + length > len(encoded):
            return None
        segment = encoded[place + 2 : place + length]
        if marker == _APP1 and segment.startswith(_EXIF):
            exif = exif or segment[len(_EXIF) :]
        scans += marker == _SCAN
        place += length
    return None


class Png(NamedTuple):
    """The still image in a PNG file."""

    content: bytes
    exif: bytes
    """A TIFF header with its fields; b'' if there is none."""


def still_png(encoded: bytes) -> Png | None:
    """Strips the animation from a PNG file, as OpenCV 5.0 can crash on it.

    Returns:
      the still image; None if a chunk claims to be longer than the rest of the file: OpenCV would
      allocate the claimed length, up to 4 GB.
    """
    parts, exif, place, name = [PNG], b'', len(PNG), b''
    while place + 12 <= len(encoded) and name != b'IEND':  # length, name, content, checksum
        length, name = struct.unpack_from('>I4s', encoded, place)
        if name == b'eXIf':
            exif = encoded[place + 8 : place + 8 + length].removeprefix(_EXIF)
        if name not in _ANIMATION:
            parts.append(encoded[place : place + 12 + length])
        place += 12 + length
    if name != b'IEND' or place > len(encoded):
        return None
    return Png(b''.join(parts), exif)


def webp_exif(encoded: bytes) -> bytes:
    """Returns the Exif fields of a WebP file, in the form of `Jpeg.exif`."""
    place = 12
    while place + 8 <= len(encoded):  # name, length, content, padded to an even length
        name, length = struct.unpack_from('<4sI', encoded, place)
        if name == b'EXIF':
            return encoded[place + 8 : place + 8 + length].removeprefix(_EXIF)
        place += 8 + length + length % 2
    return b''


def orientation(exif: bytes) -> int:
    """Returns the orientation in Exif fields, from 1 (upright) to 8; 1 if there is none."""
    value = tiff_fields(exif).get(_ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def unscaled_values(encoded: bytes) -> str:
    """Names the type of an image's values if the file does not define black and white.

    Returns:
      a description such as '32-bit float'; '' for unsigned integers of up to 16 bits.
    """
    if encoded.startswith(_FLOATS):
        return 'float'
    fields = tiff_fields(encoded)
    bits, form = fields.get(_BITS, 1), fields.get(_SAMPLE_FORMAT, 1)
    if form in (1, 4) and bits > 16:
        return f'{bits}-bit integer'
    names = {2: 'signed integer', 3: 'float', 5: 'complex integer', 6: 'complex'}
    return f'{bits}-bit {names[form]}' if form in names else ''


def tiff_fields(block: bytes) -> dict[int, int]:
    """Reads the first number of each field in the first TIFF directory.

    Source: TIFF 6.0, section 2, and BigTIFF.

    Returns:
      numbers by tag, as many as can be read.
    """
    fields: dict[int, int] = {}
    order = {b'II': '<', b'MM': '>'}.get(block[:2])
    if order is None:
        return fields
    try:
        big = struct.unpack_from(order + 'H', block, 2)[0] == 43
        size, offset, count, entry = (8, 'Q', 'Q', 20) if big else (4, 'I', 'H', 12)
        (start,) = struct.unpack_from(order + offset, block, size)
        (entries,) = struct.unpack_from(order + count, block, start)
        start += struct.calcsize(count)
        for place in range(start, min(start + entries * entry, len(block)), entry):
            tag, kind, number = struct.unpack_from(f'{order}HH{offset}', block, place)
            if (form := _TIFF_NUMBERS.get(kind)) is None or not number:
                continue
            value = place + entry - size
            if number * struct.calcsize(form) > size:
                (value,) = struct.unpack_from(order + offset, block, value)
            fields.setdefault(tag, struct.unpack_from(order + form, block, value)[0])
    except (struct.error, OverflowError):  # the fields are truncated
        pass
    return fields


AVIF, HEIF, JPEG_2000, WEBP = 'AVIF', 'HEIC', 'JPEG 2000', 'WebP'
_EMPTY, _ZEROS, _VIDEO = 'it is empty', 'it contains only zeros', 'a video'
_MARKUP, _DRAWING = 'a web page or other markup', 'a drawing in SVG'
_RAW = 'a camera raw file, whose first image is a thumbnail'
_STARTS = {
    b'version https://git-lfs': 'a Git LFS pointer; run  git lfs pull',
    b'%PDF': 'a PDF document',
    b'%!PS': 'a PostScript document',
    b'\xc5\xd0\xd3\xc6': 'a PostScript document',
    b'\xff\x0a': 'JPEG XL, which is not supported',
    b'\0\0\0\x0cJXL ': 'JPEG XL, which is not supported',
    b'PK\x03\x04': 'a zip archive',
    b'\x1f\x8b': 'a gzip archive',
    b'\x1aE\xdf\xa3': _VIDEO,
}
NOT_PHOTOGRAPHS = frozenset((_EMPTY, _ZEROS, _VIDEO, _MARKUP, _DRAWING, _RAW, *_STARTS.values()))
"""The kinds of files that are not photographs, or that no library here can read; see `kind`."""
_JPEG_2000_STARTS = (b'\0\0\0\x0cjP  ', b'\xff\x4f\xff\x51')
# PFM, Radiance and OpenEXR, whose values are always floats.
_FLOATS = (b'PF\n', b'Pf\n', b'PF\r', b'Pf\r', b'#?RADIANCE', b'#?RGBE', b'v/1\x01')


def kind(encoded: bytes) -> str:
    """Names a file's type by its first bytes; '' for formats that need no special treatment."""
    if encoded.startswith(b'RIFF') and encoded[8:12] == b'WEBP':
        return WEBP
    if encoded.startswith(_JPEG_2000_STARTS):
        return JPEG_2000
    if encoded[4:8] == b'ftyp':
        return _kind_by_brands(encoded)
    for start, name in _STARTS.items():
        if encoded.startswith(start):
            return name
    if not encoded.strip(b'\0'):
        return _ZEROS if encoded else _EMPTY
    text = encoded[:512].lstrip(b'\xef\xbb\xbf \t\r\n')
    if text.startswith(b'<'):
        return _DRAWING if b'<svg' in text else _MARKUP
    return _RAW if tiff_fields(encoded).get(_SUBFILE, 0) & 1 else ''


def _kind_by_brands(encoded: bytes) -> str:
    """Names the type of an ISO base media file by its brands (ISO 14496-12, section 4.3)."""
    end = min(int.from_bytes(encoded[:4]), 256)
    brands = {encoded[8:12], *(encoded[i : i + 4] for i in range(16, end - 3, 4))}
    if brands & {b'avif', b'avis'}:
        return AVIF
    heif = {b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1'}
    return HEIF if brands & heif else _RAW if b'crx ' in brands else _VIDEO
