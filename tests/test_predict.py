"""Predictions for images in any form, from Python and from the command line."""

import csv
import io
import json
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import xmixup_jax
from xmixup_jax import predictor as trained
from xmixup_jax.cli import predict, program
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.devices import replicate
from xmixup_jax.errors import DataError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.weights.files import save_weights

SIZES = Sizes(10, 10)  # with the columns of ten source classes, which predictions leave out


@pytest.fixture
def state(config):
    _, state = step_lib.create_task(config, SIZES)
    return state


@pytest.fixture
def workdir(config, state, tmp_path):
    """The folder of a run, with random weights."""
    content = {'class_names': tuple('abcdefghij'), 'config': config.to_dict()}
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run' / 'model.safetensors'
    save_weights(path, config.model.name, state.params, state.batch_stats, content)
    return path.parent


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)


def test_as_in_the_tests_of_the_run(config, state, workdir, records):
    _, test, _ = records
    test = test.select(np.arange(20))
    task, _ = step_lib.create_task(config, SIZES)
    tested = evaluate(task, config, replicate(state), test)
    model = xmixup_jax.load(workdir)
    # Batches of 8: two whole ones and a part of one.
    predictions = model.predict([test.read(test.index[i]) for i in range(20)], batch_size=8)
    expected = softmax(tested.logits, axis=1)
    for i, (names, probabilities) in enumerate(predictions):
        order = np.argsort(-expected[i])
        assert names == tuple('abcdefghij'[c] for c in order)
        np.testing.assert_allclose(probabilities, expected[i][order], rtol=1e-4)


def test_every_form_of_an_image_gives_the_same(workdir, picture, tmp_path):
    model = xmixup_jax.load(str(workdir))
    image = Image.fromarray(picture)
    files = {}
    # OpenCV knows the first three, Pillow alone the others.
    for suffix in ('png', 'bmp', 'tiff', 'tga', 'ico', 'pcx', 'icns'):
        files[suffix] = tmp_path / f'image.{suffix}'
        sizes = {'sizes': [picture.shape[1::-1]]} if suffix == 'ico' else {}
        (image.resize((128, 128)) if suffix == 'icns' else image).save(files[suffix], **sizes)
    forms = [picture, image, str(files['png']), files['png'].read_bytes()]
    forms += [path for suffix, path in files.items() if suffix != 'icns']
    first, *others = model.predict(forms)
    for other in others:
        assert other.class_names == first.class_names
        np.testing.assert_array_equal(other.probabilities, first.probabilities)
    (large,) = model.predict(files['icns'])
    assert len(large.class_names) == 10
    # One image is a list of one, many are [N, H, W, 3], grey ones have no colours.
    assert len(model.predict(picture)) == len(model.predict(str(files['png']))) == 1
    assert len(model.predict(np.stack([picture, picture]))) == 2
    assert len(model.predict([picture[..., 0]])) == 1
    assert model.predict([]) == []


@pytest.mark.parametrize(
    ('bad', 'words'),
    [
        (b'no image', 'not an image that can be decoded'),
        ('nowhere.png', 'nowhere.png cannot be read: No such file'),
        (np.zeros((3, 3, 4), np.uint8), r'shape \(3, 3, 4\) and type uint8: it must be'),
        (np.zeros((3, 3, 3)), 'type float64'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
    ],
)
def test_what_is_no_image(workdir, bad, words):
    with pytest.raises(DataError, match=words):
        xmixup_jax.load(workdir).predict([bad])


def test_a_bomb_that_pillow_would_decode(workdir):
    file = io.BytesIO()
    Image.new('1', (2**15, 2**13)).save(file, 'PCX')  # a few kB, 2**28 pixels
    with pytest.raises(DataError, match='too large'):
        xmixup_jax.load(workdir).predict(file.getvalue())


@pytest.mark.parametrize('form', ['TGA', 'ICO', 'PCX', 'SGI', 'DDS', 'AVIF', 'IM', 'GIF'])
def test_mutated_images_are_read_or_refused(picture, form):
    """Whatever Pillow's decoders make of them; tests/faults has OpenCV's."""
    rng, file = np.random.default_rng(), io.BytesIO()
    Image.fromarray(picture).save(file, form)
    for _ in range(60):
        content = bytearray(file.getvalue())
        for place in rng.integers(len(content[:200]), size=rng.integers(1, 6)):
            content[place] = rng.integers(256)
        try:
            assert trained._decode_any(bytes(content), 24, 'it').shape == (24, 24, 3)
        except DataError as error:
            assert str(error).startswith('it is not an image')


def test_the_command(workdir, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, 'setup', lambda config: None)  # of the whole process
    folder = tmp_path / 'photos' / 'deeper'
    folder.mkdir(parents=True)
    for name in ('one.png', 'deeper/two.jpg'):
        cv2.imwrite(str(tmp_path / 'photos' / name), picture)
    (folder / 'notes.txt').write_text('no image')

    def output(*flags):
        paths = [str(tmp_path / 'photos'), str(tmp_path / 'photos' / 'one.png')]
        predict.run(['predict', f'--workdir={workdir}', *flags, *paths])
        return capsys.readouterr().out

    rows = list(csv.DictReader(io.StringIO(output('--format=csv', '--top=0'))))
    assert len(rows) == 3 * 10
    assert [row['rank'] for row in rows[:10]] == [str(i) for i in range(1, 11)]
    assert sum(float(row['probability']) for row in rows[:10]) == pytest.approx(1, abs=1e-5)
    images = json.loads(output('--format=json', '--top=1'))
    assert [each['image'].rsplit('/', 1)[-1] for each in images] == [
        'two.jpg',
        'one.png',
        'one.png',
    ]
    assert images[1]['classes'][0]['class'] == rows[10]['class']
    table = output('--top=2')
    assert table.count(' %  ') == 6 and str(folder / 'two.jpg') in table


def test_faults_of_the_command(workdir, picture, tmp_path, capsys, monkeypatch):
    def fail(message, code):
        raise SystemExit(code, message)

    monkeypatch.setattr(program, 'fail', fail)
    monkeypatch.setattr(predict, 'setup', lambda config: None)
    cv2.imwrite(str(tmp_path / 'good.png'), picture)
    (tmp_path / 'bad.png').write_bytes((tmp_path / 'good.png').read_bytes()[:99])
    (tmp_path / 'empty').mkdir()

    def outcome(*arguments):
        with pytest.raises(SystemExit) as end:
            program.run_and_exit(predict.run, ['predict', *map(str, arguments)])
        return end.value.args

    good, bad = tmp_path / 'good.png', tmp_path / 'bad.png'
    code, message = outcome(f'--workdir={workdir}', '--format=json', bad, good)
    assert (code, message[:17]) == (1, '1 of 2 images cou')
    said = capsys.readouterr()
    assert f'{bad} is not an image' in said.err
    assert [each['image'] for each in json.loads(said.out)] == [str(good)]
    assert 'holds no images' in outcome(f'--workdir={workdir}', tmp_path / 'empty')[1]
    assert 'does not exist' in outcome(f'--workdir={workdir}', tmp_path / 'none.png')[1]
    assert 'holds no finished run' in outcome(f'--workdir={tmp_path}', good)[1]
    assert sys.modules['PIL.Image'].MAX_IMAGE_PIXELS  # Pillow's own limit stands
