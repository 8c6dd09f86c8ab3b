"""Image files as phones, cameras and browsers write them, compared with Pillow."""

import io
import struct
import sys
import types

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from xmixup_jax.data import decode as decoding
from xmixup_jax.data import headers
from xmixup_jax.data.decode import decode
from xmixup_jax.errors import DataError

SIDE = 48
LOW = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[240, 240, 0], [9, 9, 9], [0, 99, 99]]])
PIXELS = np.kron(LOW.astype(np.uint8), np.ones((24, 16, 1), np.uint8))  # no symmetry
IMAGE = Image.fromarray(PIXELS)


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation):
    fields = Image.Exif()
    fields[0x112] = orientation
    return fields


PHOTO = encode(IMAGE, 'JPEG', quality=95)
NOISE = np.random.default_rng(0).integers(256, size=2**18, dtype=np.uint8).tobytes()
TAILS = {
    'a video': struct.pack('>I', 24) + b'ftypmp42\0\0\0\0isommp42' + NOISE,
    'scans': b'\xff\xda' * 10**5,  # would be refused as too slow if they belonged to the image
    'a second image, cut short': encode(IMAGE, 'JPEG', quality=99)[:-700],
    'a second image': encode(IMAGE, 'JPEG', quality=50),
    'zeros': bytes(4096),
    'XMP': b'<?xpacket begin="" ?><x:xmpmeta xmlns:x="adobe:ns:meta/"/><?xpacket end="w"?>',
    'one byte': b'\n',
}


@pytest.mark.parametrize('name', TAILS)
@pytest.mark.parametrize('progressive', [False, True])
def test_the_first_image_counts(name, progressive):
    photo = encode(IMAGE, 'JPEG', quality=95, progressive=progressive, exif=exif(6))
    expected = decode(photo, SIDE, 'photo')
    np.testing.assert_array_equal(decode(photo + TAILS[name], SIDE, name), expected)


def test_images_of_a_multi_picture_file():
    other = Image.fromarray(255 - PIXELS)
    mpo = encode(IMAGE, 'MPO', save_all=True, append_images=[other], quality=95)
    assert np.abs(decode(mpo, SIDE, 'mpo').astype(int) - PIXELS).mean() < 4


@pytest.mark.parametrize('tail', [b'', bytes(99)], ids=['', 'zeros'])
@pytest.mark.parametrize('progressive', [False, True])
def test_a_photo_cut_short_is_refused_wherever_it_is_cut(progressive, tail):
    thumbnail = b'\xff\xe1' + struct.pack('>H', 8 + len(PHOTO)) + b'Exif\0\0' + PHOTO
    photo = encode(IMAGE, 'JPEG', quality=60, progressive=progressive)
    photo = photo[:2] + thumbnail + photo[2:]
    assert decode(photo, SIDE, 'whole').shape == (SIDE, SIDE, 3)
    for length in range(2, len(photo), 37):
        with pytest.raises(DataError, match=r'photo\.jpg is not an image.*truncated'):
            decode(photo[:length] + tail, SIDE, 'photo.jpg')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize(
    ('form', 'options'),
    [
        ('JPEG', {'quality': 95}),
        ('PNG', {}),
        ('WEBP', {'lossless': True}),
        ('TIFF', {}),
        ('TIFF', {'compression': 'tiff_lzw'}),
        ('AVIF', {'quality': 95}),
    ],
)
def test_orientation(form, options, orientation):
    if form == 'AVIF' and not features.check('avif'):
        pytest.skip('Pillow was built without AVIF')
    encoded = encode(IMAGE, form, exif=exif(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert('RGB')
    difference = decode(encoded, SIDE, form).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 4


def test_orientation_behind_a_large_colour_profile():
    """Made by hand: some cameras put Exif there, but OpenCV and Pillow do not."""
    profile = b''.join(b'\xff\xe2' + struct.pack('>H', 65535) + bytes(65533) for _ in range(2))
    fields = b'MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'
    segment = b'\xff\xe1' + struct.pack('>H', 8 + len(fields)) + b'Exif\0\0' + fields
    photo = PHOTO[:2] + profile + segment + PHOTO[2:]
    expected = IMAGE.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(decode(photo, SIDE, 'it').astype(int) - np.asarray(expected)).mean() < 4


NO_ORIENTATION = {
    'empty': b'',
    'cut short': b'MM',
    'no directory': b'II*\0\xff\xff\xff\xff',
    'too many fields': b'MM\0\x2a' + b'\xff' * 99,
    'out of range': b'MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0',
}


@pytest.mark.parametrize('fields', NO_ORIENTATION.values(), ids=NO_ORIENTATION)
def test_damaged_exif_is_no_orientation(fields):
    segment = b'\xff\xe1' + struct.pack('>H', 8 + len(fields)) + b'Exif\0\0' + fields
    photo = PHOTO[:2] + segment + PHOTO[2:]
    np.testing.assert_array_equal(decode(photo, SIDE, 'it'), decode(PHOTO, SIDE, 'it'))
    assert headers.orientation(fields) == 1


@pytest.mark.parametrize(
    ('form', 'options'), [('JPEG2000', {}), ('JPEG2000', {'no_jp2': True}), ('AVIF', {})]
)
def test_formats_of_pillow(form, options):
    if not features.check({'JPEG2000': 'jpg_2000', 'AVIF': 'avif'}[form]):
        pytest.skip('Pillow was built without it')
    encoded = encode(IMAGE, form, **options)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))
    np.testing.assert_array_equal(decode(encoded, SIDE, form), expected)


def test_16_bits_that_pillow_reads():
    grey = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 28
    encoded = encode(Image.fromarray(grey), 'JPEG2000')
    difference = decoding._by_pillow(encoded)[..., 0].astype(int) - grey // 256
    assert np.abs(difference).max() <= 1


def test_suffixes_are_those_of_photographs():
    suffixes = decoding.image_suffixes()
    assert {'.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp'} <= suffixes
    assert ('.avif' in suffixes) == features.check('avif')
    assert ('.jp2' in suffixes) == features.check('jpg_2000')
    assert not suffixes & {'.pdf', '.eps', '.mpg', '.h5', '.fits', '.svg', '.mp4', '.wmf', '.txt'}
    assert all(suffix == suffix.lower() and suffix[0] == '.' for suffix in suffixes)


HEIC = struct.pack('>I', 24) + b'ftypheic\0\0\0\0mif1heic' + NOISE[:999]


@pytest.fixture
def anew():
    """Clears what is cached about installed packages, before and after the test."""
    cached = (decoding.image_suffixes, decoding._register_heif)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_heic_names_the_package(anew, monkeypatch):
    monkeypatch.setattr(decoding.importlib.util, 'find_spec', lambda name: None)
    assert '.heic' not in decoding.image_suffixes()
    assert decoding.missing_package('.HEIC') == 'pillow-heif'
    assert decoding.missing_package('.jpg') is decoding.missing_package('.txt') is None
    # Whatever the file is called.
    with pytest.raises(
        DataError, match=r'photo\.jpg .*HEIC\): run  pip install pillow-heif  to read'
    ):
        decode(HEIC, SIDE, 'photo.jpg')


def test_heic_with_the_package(anew, monkeypatch):
    """The installed package registers itself with Pillow; the one here reads PNG."""
    registered = []

    def register():
        registered.append(True)
        Image.register_open('STAND-IN', factory, lambda prefix: prefix[4:12] == b'ftypheic')

    def factory(file, name):
        return Image.open(io.BytesIO(file.read()[len(HEIC) :]))

    package = types.ModuleType('pillow_heif')
    package.register_heif_opener, package.__spec__ = register, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, 'pillow_heif', package)
    try:
        for _ in range(2):
            decoded = decode(HEIC + encode(IMAGE, 'PNG', exif=exif(3)), SIDE, 'photo.heic')
            np.testing.assert_array_equal(decoded, PIXELS[::-1, ::-1])
        assert registered == [True]
        assert {'.heic', '.heif'} <= decoding.image_suffixes()
    finally:
        del Image.OPEN['STAND-IN']
        Image.ID.remove('STAND-IN')


def tiff(values, sample_format, big=False):
    """A grey TIFF of one strip, or BigTIFF, written by hand."""
    bits = 8 * values.dtype.itemsize
    size, header = ('Q', b'II\x2b\0\x08\0\0\0') if big else ('I', b'II\x2a\0')
    start = len(header) + struct.calcsize(size)
    height, width = values.shape
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: start, 277: 1}
    fields |= {278: height, 279: values.nbytes, 339: sample_format}
    directory = b''.join(
        struct.pack(f'<HH{size}{size}', tag, {'I': 4, 'Q': 16}[size], 1, value)
        for tag, value in fields.items()
    )
    count = struct.pack('<Q' if big else '<H', len(fields))
    place = struct.pack(f'<{size}', start + values.nbytes)
    return header + place + values.tobytes() + count + directory + bytes(8)


GREY = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
UNSCALED = {
    'float32': (tiff(GREY, 3), '32-bit float'),
    'float64': (tiff(GREY.astype(np.float64), 3), '64-bit float'),
    'float16': (tiff(GREY.astype(np.float16), 3), '16-bit float'),
    'float32 in BigTIFF': (tiff(GREY, 3, big=True), '32-bit float'),
    'int32': (tiff((1e6 * GREY).astype(np.int32), 2), '32-bit signed integer'),
    'uint32': (tiff((1e6 * GREY).astype(np.uint32), 1), '32-bit integer'),
    'int16': (tiff((1e3 * GREY).astype(np.int16), 2), '16-bit signed integer'),
    "Pillow's F": (encode(Image.fromarray(GREY), 'TIFF'), '32-bit float'),
    "Pillow's I": (encode(Image.fromarray(GREY.astype(np.int32)), 'TIFF'), '32-bit signed'),
    'Radiance': (cv2.imencode('.hdr', np.dstack([GREY] * 3))[1].tobytes(), 'float'),
    'PFM': (b'Pf\n48 48\n-1.0\n' + GREY.tobytes(), 'float'),
    'FITS': (encode(Image.fromarray(GREY), 'IM'), '32-bit float'),
}


@pytest.mark.parametrize('name', UNSCALED)
def test_values_without_a_scale_are_refused(name):
    encoded, words = UNSCALED[name]
    with pytest.raises(DataError, match=rf'scan\.tif .*{words}.*: save it with 8 or 16 bits'):
        decode(encoded, SIDE, 'scan.tif')


@pytest.mark.parametrize('big', [False, True])
def test_integers_of_up_to_16_bits_have_one(big):
    grey = (255 * GREY).astype(np.uint8)
    assert (decode(tiff(grey, 1), SIDE, '8 bits')[..., 0] == grey).all()
    sixteen = decode(tiff(grey.astype(np.uint16) * 257, 1, big), SIDE, '16 bits')
    assert np.abs(sixteen[..., 0].astype(int) - grey).max() <= 1


FAULTS = {
    b'': 'it is empty',
    bytes(99): 'only zeros',
    b'\xef\xbb\xbf\n <!DOCTYPE html><title>404</title>': 'a web page',
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>': 'a drawing in SVG',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n': 'git lfs pull',
    b'%PDF-1.7\n': 'a PDF document',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n': 'a PostScript document',
    b'\0\0\0\x18ftypmp42\0\0\0\0isommp42': 'a video',
    b'\0\0\0\x18ftypcrx \0\0\0\0crx isom': 'a camera raw file',
    b'\xff\x0a' + NOISE[:99]: 'JPEG XL',
    encode(Image.new('1', (2**14, 2**14)), 'TIFF', compression='group4'): 'too large',
}


@pytest.mark.parametrize('content', FAULTS, ids=list(FAULTS.values()))
def test_the_fault_is_named(content):
    with pytest.raises(DataError, match=rf'photo\.jpg is not an image .*{FAULTS[content]}'):
        decode(content, SIDE, 'photo.jpg')


def test_a_raw_file_is_no_thumbnail():
    """Its first image is a thumbnail (TIFF 6.0, NewSubfileType), which OpenCV would read."""
    raw = bytearray(tiff((255 * GREY).astype(np.uint8), 1))
    place = raw.index(struct.pack('<HHII', 277, 4, 1, 1))
    raw[place : place + 12] = struct.pack('<HHII', 254, 4, 1, 1)
    with pytest.raises(DataError, match='a camera raw file, whose first image is a thumb'):
        decode(bytes(raw), SIDE, 'photo.dng')
