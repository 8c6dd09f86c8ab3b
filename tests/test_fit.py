"""config.fit: how images that are not square become squares, compared with Pillow."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageOps

import xmixup_jax
from xmixup_jax import predictor
from xmixup_jax.compute import features
from xmixup_jax.data import decode as decoding
from xmixup_jax.data import records as records_lib
from xmixup_jax.data.cache import choose_cache, with_caches
from xmixup_jax.data.decode import FITS, decode, square
from xmixup_jax.data.pairing import eval_batches, train_batches
from xmixup_jax.data.pool import fill_pool
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.run.train import train_and_evaluate

LINEAR = Image.Resampling.BILINEAR
SHAPES = [(240, 320), (320, 240), (240, 240), (40, 400), (400, 90), (30, 41), (7, 300), (100, 3)]


def picture(shape):
    rng = np.random.default_rng(1)
    low = rng.integers(256, size=(*(max(1, side // 40) for side in shape), 3), dtype=np.uint8)
    return Image.fromarray(low).resize(shape[::-1], Image.Resampling.BICUBIC)


def as_pillow(image, size, fit):
    if fit == 'pad':
        return np.asarray(ImageOps.pad(image, (size, size), LINEAR), int)
    if fit == 'squash':
        return np.asarray(image.resize((size, size), LINEAR), int)
    return np.asarray(ImageOps.fit(image, (size, size), LINEAR), int)


@pytest.mark.parametrize('fit', ['pad', 'squash'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('size', [24, 60, 200, 250, 320])
def test_squares_are_those_of_pillow(shape, size, fit):
    image = picture(shape)
    ours, theirs = square(np.asarray(image), size, fit), as_pillow(image, size, fit)
    assert ours.shape == (size, size, 3) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    assert np.abs(ours - theirs).mean() < 3


@pytest.mark.parametrize('shape', SHAPES)
def test_the_image_lies_in_the_middle_of_black(shape):
    white = Image.new('RGB', shape[::-1], 'white')
    np.testing.assert_array_equal(square(np.asarray(white), 60, 'pad'), as_pillow(white, 60, 'pad'))


def test_a_line_keeps_a_pixel():
    padded = square(np.full((100, 1, 3), 255, np.uint8), 24, 'pad')
    assert (padded[:, 12] == 255).all() and padded.sum() == 24 * 3 * 255


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('side', [24, 48, 60, 130, 200, 300])
@pytest.mark.parametrize('form', ['plain', 'grey', 'cmyk', 'tall'])
def test_jpegs_at_every_scale(side, form, fit):
    image = picture((320, 240) if form == 'tall' else (240, 320))
    image = image.convert({'grey': 'L', 'cmyk': 'CMYK'}.get(form, 'RGB'))
    encoded = encode(image, 'JPEG', quality=95)
    expected = as_pillow(Image.open(io.BytesIO(encoded)).convert('RGB'), side, fit)
    assert np.abs(decode(encoded, side, form, fit) - expected).mean() < 3


def test_a_jpeg_to_pad_is_decoded_no_larger_than_it_becomes(monkeypatch):
    shapes = []
    whole = square
    monkeypatch.setattr(
        decoding, 'square', lambda x, *rest: shapes.append(x.shape) or whole(x, *rest)
    )
    encoded = encode(picture((160, 640)), 'JPEG')
    for fit in FITS:
        decode(encoded, 80, '', fit)
    assert shapes == [(80, 320, 3), (20, 80, 3), (80, 320, 3)]


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('fit', ['pad', 'squash'])
def test_upright_images_are_fitted(form, orientation, fit):
    fields = Image.Exif()
    fields[0x112] = orientation
    encoded = encode(picture((120, 200)), form, exif=fields)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert('RGB')
    assert np.abs(decode(encoded, 48, form, fit) - as_pillow(upright, 48, fit)).mean() < 3


WIDE = np.random.default_rng(0).integers(256, size=(6, 8, 24, 3), dtype=np.uint8)


@pytest.fixture
def wide():
    return Records.from_arrays(WIDE, np.arange(6) % 2, ['a', 'b'])


@pytest.mark.parametrize('fit', FITS)
def test_batches_and_pool(wide, config, fit):
    expected = [square(image, 12, fit) for image in WIDE]
    (tested,) = eval_batches(wide, batch_size=6, resize=12, num_threads=1, fit=fit)
    np.testing.assert_array_equal(tested['image'], expected)
    data = Data(wide, None, None)
    options = {'seed': 0, 'batch_size': 6, 'resize': 12, 'num_threads': 1, 'fit': fit}
    pixels = next(iter(train_batches(data, None, **options)))
    places = next(iter(train_batches(data, None, positions=True, **options)))
    np.testing.assert_array_equal(pixels['image'], np.stack(expected)[places['image']])
    config.update({'resize': 12, 'fit': fit})
    pool = np.asarray(fill_pool(config, {'image': wide})['image'])
    np.testing.assert_array_equal(pool.reshape(-1, 12, 12, 3)[:6], expected)


@pytest.mark.parametrize('kind', ['memory', 'disk'])
def test_caches_know_the_fit(wide, config, kind, tmp_path):
    config.update({'resize': 12, 'cache_dir': str(tmp_path)})
    config.data.cache = kind
    for _ in range(2):  # the second time they are found
        for fit in FITS:
            config.fit = fit
            assert choose_cache(config, [wide]) == kind
            cached = with_caches(config, kind, Data(wide, None, None), None).target
            image = cached.image(0, 12, fit)
            np.testing.assert_array_equal(image, square(WIDE[0], 12, fit))
    if kind == 'disk':
        assert len(list((tmp_path / 'decoded').iterdir())) == 3


def test_class_means_know_the_fit(wide, config):
    backbone = ConfigDict({'digest': 'x'})
    paths = set()
    for fit in FITS:
        config.fit = fit
        paths.add(features._cache_path(config, backbone, wide, 'means'))
    assert len(paths) == 3
    config.precision = 'bfloat16'
    assert features._cache_path(config, backbone, wide, 'means') not in paths


@pytest.mark.slow
def test_a_run_fits_all_its_images_alike(config, tmp_path, monkeypatch):
    """The same fit is used in training, matching, test, report, evaluation and prediction."""
    seen = []

    def watched(original, place):
        def wrapper(*args):
            seen.append((place, args[2:] if original is square else args[3:]))
            return original(*args)

        return wrapper

    monkeypatch.setattr(records_lib, 'decode', watched(decode, 'run'))
    monkeypatch.setattr(predictor, 'decode', watched(decode, 'predict'))
    monkeypatch.setattr(predictor, 'square', watched(square, 'predict'))
    config.update({'fit': 'pad', 'report': True, 'method': 'xmixup', 'steps': 2})
    config.cache_dir = str(tmp_path / 'cache')
    train_and_evaluate(config, tmp_path / 'run')
    model = xmixup_jax.load(tmp_path / 'run')
    content = encode(Image.fromarray(WIDE[0]), 'PNG')
    (tmp_path / 'photo.png').write_bytes(content)
    answers = model.predict([content, tmp_path / 'photo.png', WIDE[0], Image.fromarray(WIDE[0])])
    assert {place for place, _ in seen} == {'run', 'predict'}
    assert {fit for _, fit in seen} == {('pad',)}
    wide = Records.from_arrays(WIDE, np.zeros(6, int), model.class_names)
    tested = model.test(wide)
    padded = Records.from_arrays(
        [square(image, config.resize, 'pad') for image in WIDE], wide.labels, model.class_names
    )
    np.testing.assert_array_equal(tested.logits, model.test(padded).logits)
    best = [model.class_names[c] for c in tested.logits[:1].argmax(1)]
    assert [answer.class_names[0] for answer in answers] == 4 * best
