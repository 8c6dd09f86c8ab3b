"""Every usual image format is decoded as in Pillow, and everything else is skipped."""

import io
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import make_folder

from xmixup_jax.data.decode import decode
from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.selection import open_split, train_and_test
from xmixup_jax.errors import DataError
from xmixup_jax.run.train import train_and_evaluate

SIDE = 48
RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(256, size=(3, 3, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
IMAGE = Image.fromarray(PIXELS)
GREY = np.asarray(IMAGE.convert('L').convert('RGB'))


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def of_cv2(suffix, pixels):
    return cv2.imencode(suffix, pixels)[1].tobytes()


def animation(form, **options):
    image = IMAGE.convert('P') if form == 'GIF' else IMAGE
    other = Image.fromarray(255 - PIXELS)
    other = other.convert('P') if form == 'GIF' else other
    return encode(image, form, save_all=True, append_images=[other], **options)


TURNED = Image.Exif()
TURNED[0x112] = 6  # to be turned right
SIXTEEN = PIXELS[..., ::-1].astype(np.uint16) * 257
WITH_ALPHA = Image.fromarray(np.dstack([PIXELS, np.full((SIDE, SIDE), 100, np.uint8)]))
PALETTE = np.asarray(IMAGE.convert('P').convert('RGB'))

GOOD = {
    'jpeg': (encode(IMAGE, 'JPEG', quality=100, subsampling=0), PIXELS),
    'progressive jpeg': (
        encode(IMAGE, 'JPEG', quality=100, subsampling=0, progressive=True),
        PIXELS,
    ),
    'grey jpeg': (encode(IMAGE.convert('L'), 'JPEG', quality=100), GREY),
    'cmyk jpeg': (encode(IMAGE.convert('CMYK'), 'JPEG', quality=100), PIXELS),
    'cmyk tiff': (encode(IMAGE.convert('CMYK'), 'TIFF'), PIXELS),
    'turned jpeg': (
        encode(IMAGE, 'JPEG', quality=100, subsampling=0, exif=TURNED),
        np.asarray(IMAGE.transpose(Image.Transpose.ROTATE_270)),
    ),
    '16-bit png': (of_cv2('.png', SIXTEEN), PIXELS),
    '16-bit grey png': (of_cv2('.png', SIXTEEN[..., 2]), np.repeat(PIXELS[..., :1], 3, 2)),
    '16-bit tiff': (of_cv2('.tif', SIXTEEN), PIXELS),
    'alpha png': (encode(WITH_ALPHA, 'PNG'), PIXELS),
    'alpha webp': (encode(WITH_ALPHA, 'WEBP', lossless=True, exact=True), PIXELS),
    'palette png': (encode(IMAGE.convert('P'), 'PNG'), PALETTE),
    'transparent palette': (encode(IMAGE.convert('P'), 'PNG', transparency=0), PALETTE),
    'black and white': (
        encode(IMAGE.convert('1'), 'PNG'),
        np.asarray(IMAGE.convert('1').convert('RGB')),
    ),
    'animated gif': (animation('GIF'), PALETTE),
    'animated webp': (animation('WEBP', lossless=True), PIXELS),
    'animated png': (animation('PNG'), PIXELS),
    'pages of a tiff': (animation('TIFF'), PIXELS),
    'ppm': (encode(IMAGE, 'PPM'), PIXELS),
}
NOISE = Image.fromarray(RNG.integers(256, size=(64, 64, 3), dtype=np.uint8))
BAD = {
    'nothing': b'',
    'text': b'this is a text file',
    'html': b'<html><body>404 not found</body></html>',
    'zeros': bytes(1000),
    'half a jpeg': encode(NOISE, 'JPEG')[:2000],
    'jpeg without end marker': encode(NOISE, 'JPEG')[:-2],
    'jpeg with a thumbnail, cut short': b'\xff\xd8\xff\xd9' + encode(NOISE, 'JPEG')[2:2000],
    'half a png': encode(NOISE, 'PNG')[:3000],
    'half a webp': encode(NOISE, 'WEBP')[:900],
    'bomb': encode(Image.new('L', (12000, 12000)), 'PNG'),  # 144 million pixels in 170 kB
}


@pytest.mark.parametrize('name', GOOD)
def test_decoded_as_pillow_does(name):
    encoded, expected = GOOD[name]
    decoded = decode(encoded, SIDE, name)
    assert decoded.shape == (SIDE, SIDE, 3)
    # JPEG and CMYK are not exact; a wrong channel, bit depth or page would be far off.
    assert np.abs(decoded.astype(int) - expected).mean() < 2


@pytest.mark.parametrize('side', [24, 36, 48, 60, 90, 200, 230, 300])
@pytest.mark.parametrize('form', ['plain', 'progressive', 'grey', 'exif', 'cmyk'])
def test_jpegs_at_every_scale_are_pillows_reduced(side, form):
    """Whatever scale libjpeg decodes at, the result is that of Pillow's antialiased resize."""
    low = Image.fromarray(np.random.default_rng(1).integers(256, size=(12, 16, 3), dtype=np.uint8))
    image = low.resize((320, 240), Image.Resampling.BICUBIC)
    image = image.convert({'grey': 'L', 'cmyk': 'CMYK'}.get(form, 'RGB'))
    options = {'exif': TURNED} if form == 'exif' else {'progressive': form == 'progressive'}
    encoded = encode(image, 'JPEG', quality=95, **options)
    whole = Image.open(io.BytesIO(encoded)).convert('RGB')
    whole = whole.transpose(Image.Transpose.ROTATE_270) if form == 'exif' else whole
    left, top = (whole.width - 240) // 2, (whole.height - 240) // 2
    box = (left, top, left + 240, top + 240)
    expected = whole.resize((side, side), Image.Resampling.BILINEAR, box)
    difference = np.abs(decode(encoded, side, form).astype(int) - np.asarray(expected))
    assert difference.mean() < 3


@pytest.mark.parametrize('name', BAD)
def test_no_image_says_so(name):
    with pytest.raises(DataError, match=r'photo\.jpg is not an image that can be decoded'):
        decode(BAD[name], SIDE, 'photo.jpg')


@settings(max_examples=300)
@given(st.sampled_from(sorted(GOOD)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255))))
def test_damage_gives_an_image_or_an_error(name, damage):
    encoded = bytearray(GOOD[name][0])
    for place, value in damage:
        encoded[int(place * (len(encoded) - 1))] = value
    try:
        decoded = decode(bytes(encoded), 8, name)
    except DataError:
        return
    assert decoded.shape == (8, 8, 3)
    assert decoded.dtype == np.uint8


def with_damage(root, split, damaged):
    """An image folder of two classes with four files each, some of which are not images."""
    files = [f'{part}/{c}/{i}.png' for part in ('train', 'test') for c in 'ab' for i in range(4)]
    dataset = make_folder(root, files)
    for name, encoded in damaged.items():
        (root / split / name).write_bytes(encoded)
    return dataset


def test_training_takes_the_next_of_the_class(tmp_path, config, caplog):
    dataset = with_damage(tmp_path, 'train', {'a/1.png': b'', 'b/3.png': BAD['text']})
    train, _ = train_and_test(dataset, config)
    images = [train.image_or_next(i, 9) for i in range(8)]
    assert [i for i in range(8) if train.image(i, 9) is None] == [1, 7]
    np.testing.assert_array_equal(images[1], images[2])
    np.testing.assert_array_equal(images[7], images[4])
    assert train.skipped == 2
    assert train.select(np.arange(4)).skipped == 1
    # Each skipped file is reported once, by its name.
    assert sum('Skipped: ' in message for message in caplog.messages) == 2
    assert f'{tmp_path}/train/a/1.png' in caplog.text


def test_evaluation_leaves_them_out(tmp_path, config):
    dataset = with_damage(tmp_path, 'test', {'a/0.png': b''})
    records = open_split(dataset, 'test', config)
    batches = list(eval_batches(records, batch_size=4, resize=9, num_threads=1))
    assert np.concatenate([batch['mask'] for batch in batches]).tolist() == [0] + [1] * 7


def test_limit_and_class_without_images(tmp_path, config):
    damaged = {f'a/{i}.png': b'' for i in range(4)}
    dataset = with_damage(tmp_path, 'train', damaged)
    config.max_bad_images = 3
    train, _ = train_and_test(dataset, config)
    with pytest.raises(DataError, match=r'config\.max_bad_images=3 images of a split are skipped'):
        train.image_or_next(0, 9)
    config.max_bad_images = 4
    train, _ = train_and_test(dataset, config)
    with pytest.raises(DataError, match=r"class 'a' of folder:.* has no image that can be decoded"):
        train.image_or_next(0, 9)


def test_a_run_reports_what_it_skipped(tmp_path, config, caplog):
    dataset = with_damage(
        tmp_path / 'images', 'train', {'a/1.png': GOOD['cmyk jpeg'][0], 'b/3.png': BAD['text']}
    )
    (tmp_path / 'images/test/a/0.png').write_bytes(BAD['half a jpeg'])
    config.method, config.weights = 'finetune', ''
    config.target = dataset
    with caplog.at_level(logging.WARNING):
        result = train_and_evaluate(config, tmp_path / 'run')
    assert result['skipped_images'] == 2
    assert (result['train_images'], result['test_images']) == (8, 7)
    stored = json.loads((tmp_path / 'run/result.json').read_text())
    assert stored['skipped_images'] == 2
    config.max_bad_images = 0
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(DataError, match=r'is not an image that can be decoded \(19 bytes'):
        train_and_evaluate(config, tmp_path / 'run')


def test_xmixup_goes_on_with_bad_source_images(tmp_path, config):
    dataset = with_damage(tmp_path, 'train', {'a/1.png': b'', 'b/0.png': b'x'})
    config.source, config.target = dataset, dataset
    config.match.assignment = 'nearest'
    result = train_and_evaluate(config, tmp_path / 'run')
    assert result['skipped_images'] == 4  # two in the target, and the same two in the source
