"""Predictions for images in any form, from Python and from the command line."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.special import softmax

import xmixup_jax
from xmixup_jax.cli import export, predict, program
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.data.decode import decode
from xmixup_jax.devices import replicate
from xmixup_jax.errors import ConfigError, DataError, UserError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.weights.files import save_weights

SIZES = Sizes(10, 10)  # with ten source classes, which predictions leave out


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
    # OpenCV reads the first three, only Pillow the others.
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


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_of_pillow_are_turned_as_their_files_are(workdir, picture, tmp_path, orientation):
    fields = Image.Exif()
    fields[0x112] = orientation
    Image.fromarray(picture).save(tmp_path / 'photo.png', exif=fields)
    model = xmixup_jax.load(workdir)
    with Image.open(tmp_path / 'photo.png') as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
        of_file, of_image, of_pixels = model.predict([tmp_path / 'photo.png', image, upright])
    for other in (of_image, of_pixels):
        np.testing.assert_array_equal(of_file.probabilities, other.probabilities)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'I;16'])
def test_images_of_pillow_in_every_mode(workdir, picture, mode):
    image = Image.fromarray(picture)
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
        expected = np.asarray(image) >> 8
        expected = np.repeat(expected.astype(np.uint8)[..., None], 3, 2)
    else:
        image = image.convert(mode)
        expected = np.asarray(image.convert('RGB'))
    model = xmixup_jax.load(workdir)
    given, pixels = model.predict([image, expected])
    np.testing.assert_array_equal(given.probabilities, pixels.probabilities)


def test_images_of_pillow_that_training_would_refuse(workdir, picture):
    model, file = xmixup_jax.load(workdir), io.BytesIO()
    grey = np.zeros((9, 9))
    for dtype, words in ((np.float32, '32-bit float'), (np.int32, '32-bit integer')):
        with pytest.raises(DataError, match=f'{words} values, whose scale is unknown'):
            model.predict(Image.fromarray(grey.astype(dtype)))
    Image.fromarray(picture).save(file, 'JPEG')
    with pytest.raises(DataError, match=r'a Pillow image cannot be read: .*truncated'):
        model.predict(Image.open(io.BytesIO(file.getvalue()[:700])))


def test_a_bomb_that_pillow_would_decode(workdir):
    file = io.BytesIO()
    Image.new('1', (2**15, 2**13)).save(file, 'PCX')  # a few kB, 2**28 pixels
    with pytest.raises(DataError, match='too large'):
        xmixup_jax.load(workdir).predict(file.getvalue())


@pytest.mark.parametrize('form', ['TGA', 'ICO', 'PCX', 'SGI', 'DDS', 'AVIF', 'IM', 'GIF'])
def test_mutated_images_are_read_or_refused(picture, form):
    """Fuzzes Pillow's decoders; tests/faults fuzzes OpenCV's."""
    rng, file = np.random.default_rng(), io.BytesIO()
    Image.fromarray(picture).save(file, form)
    for _ in range(60):
        content = bytearray(file.getvalue())
        for place in rng.integers(len(content[:200]), size=rng.integers(1, 6)):
            content[place] = rng.integers(256)
        try:
            assert decode(bytes(content), 24, 'it').shape == (24, 24, 3)
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
    assert 'contains no images' in outcome(f'--workdir={workdir}', tmp_path / 'empty')[1]
    assert 'does not exist' in outcome(f'--workdir={workdir}', tmp_path / 'none.png')[1]
    assert 'contains no finished run' in outcome(f'--workdir={tmp_path}', good)[1]
    assert sys.modules['PIL.Image'].MAX_IMAGE_PIXELS  # Pillow's own limit stands


@pytest.fixture
def tested(workdir, config, state):
    """The folder of a run with another network, the best one during training."""
    best = jax.tree.map(lambda leaf: leaf + 0.5, state.params)
    content = {'class_names': tuple('abcdefghij'), 'config': config.to_dict()}
    content['score'] = {'best_step': 4, 'best_top1': 0.625, 'best_loss': 1.0}
    path = workdir / 'best_model.safetensors'
    save_weights(path, config.model.name, best, state.batch_stats, content)
    return workdir


def test_the_network_can_be_chosen(tested, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, 'setup', lambda config: None)
    Image.fromarray(picture).save(tmp_path / 'image.png')
    outputs = {}
    for network, words in {
        'final': r'model\.safetensors, the final one of the run \(which also has a best one\)',
        'best': r'best_model\.safetensors, the best of the run \(step 4, 62\.50 % top-1 in',
    }.items():
        arguments = [f'--workdir={tested}', f'--network={network}', str(tmp_path / 'image.png')]
        predict.run(['predict', '--format=json', *arguments])
        said = capsys.readouterr()
        assert re.fullmatch(rf'xmixup: the network in {tested}/{words}.*\n', said.err)
        outputs[network] = json.loads(said.out)[0]['classes']
        (expected,) = xmixup_jax.load(tested, network=network).predict(picture)
        assert [each['class'] for each in outputs[network]] == list(expected.class_names[:5])
    assert outputs['final'] != outputs['best']
    (tested / 'best_model.safetensors').unlink()
    assert xmixup_jax.load(tested).path.name == 'model.safetensors'
    with pytest.raises(ConfigError, match=r'has no best_model.*config\.eval_every'):
        xmixup_jax.load(tested, network='best')
    with pytest.raises(ConfigError, match=r"network='last': must be one of final, best"):
        xmixup_jax.load(tested, network='last')
    with pytest.raises(ConfigError, match='single network: to choose network=best, name'):
        xmixup_jax.load(tested / 'model.safetensors', network='best')


def test_what_a_folder_holds_besides_is_counted(workdir, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, 'setup', lambda config: None)
    root = tmp_path / 'photos'
    for name in ('a.jpg', '._a.jpg', '.cache/b.png', 'deep/er/c.PNG'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), picture)
    for name in ('Thumbs.db', 'notes.txt', 'more.txt', 'film.mp4'):
        (root / name).write_text('no image')
    (root / 'deep/loop').symlink_to(root, target_is_directory=True)
    (root / 'nowhere.jpg').symlink_to(root / 'gone.jpg')
    os.mkfifo(root / 'pipe.jpg')
    predict.run(['predict', f'--workdir={workdir}', '--format=json', str(root)])
    said = capsys.readouterr()
    named = [each['image'] for each in json.loads(said.out)]
    assert named == [str(root / 'a.jpg'), str(root / 'deep/er/c.PNG')]
    (line,) = [line for line in said.err.splitlines() if 'left out' in line]
    for words in ('3 hidden or system', '2 .txt', '1 .mp4', '1 broken link'):
        assert words in line
    with pytest.raises(DataError, match=r'deep/none contains no images \(it has 1 \.txt\)'):
        (root / 'deep/none').mkdir()
        (root / 'deep/none/a.txt').touch()
        predict.run(['predict', f'--workdir={workdir}', str(root / 'deep/none')])
    with pytest.raises(DataError, match='is a broken link'):
        predict.run(['predict', f'--workdir={workdir}', str(root / 'nowhere.jpg')])
    with pytest.raises(UserError, match='1 of 1 images could not be decoded'):
        predict.run(['predict', f'--workdir={workdir}', str(root / 'pipe.jpg')])
    assert 'pipe.jpg is not a regular file' in capsys.readouterr().err


NAMES = [b'caf\xe9.png', b'two\nlines.png', b'-dash.png', b'it\'s "quoted" $x.png']


@pytest.mark.parametrize('form', predict.FORMATS)
def test_names_of_every_kind(workdir, picture, tmp_path, form, monkeypatch):
    monkeypatch.setattr(predict, 'setup', lambda config: None)
    folder = os.fsencode(tmp_path / 'photos')
    Path(os.fsdecode(folder)).mkdir()
    content = cv2.imencode('.png', picture)[1].tobytes()
    for name in NAMES:
        Path(os.fsdecode(folder + b'/' + name)).write_bytes(content)
    written = io.TextIOWrapper(io.BytesIO(), 'utf-8')  # as strict as that of a pipe
    monkeypatch.setattr(sys, 'stdout', written)
    predict.run(['predict', f'--workdir={workdir}', f'--format={form}', os.fsdecode(folder)])
    written.flush()
    text = written.buffer.getvalue().decode()
    assert 'caf\\xe9.png' in text.replace('\\\\', '\\')
    if form == 'json':
        assert len(json.loads(text)) == 4
    if form == 'csv':
        assert len(list(csv.DictReader(io.StringIO(text, newline='')))) == 4 * 5
    if form == 'table':
        assert 'two\\nlines.png' in text and len(text.splitlines()) == 4 * 6


def test_where_an_export_goes(workdir, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'exported'
    folder.mkdir()

    def exported(form, output):
        export.run(['export', f'--workdir={workdir}', f'--format={form}', f'--output={output}'])
        return Path(capsys.readouterr().out.split('  ->  ')[1].strip())

    assert exported('safetensors', folder) == folder / 'model.safetensors'
    assert exported('safetensors', f'{tmp_path}/new/') == tmp_path / 'new/model.safetensors'
    assert exported('safetensors', tmp_path / 'mine.safetensors').is_file()
    # An orbax checkpoint is a folder, and replaces one that is already there.
    for _ in range(2):
        assert exported('orbax', folder) == folder / 'orbax'
        assert exported('orbax', tmp_path / 'checkpoint') == tmp_path / 'checkpoint'
    assert (folder / 'orbax.json').is_file() and (folder / 'model.safetensors.json').is_file()
    with pytest.raises(ConfigError, match=r'model\.safetensors is a file, not a folder'):
        exported('torch', folder / 'model.safetensors' / 'deeper.pth')
    classes = [xmixup_jax.load(path).class_names for path in (workdir, folder)]
    assert classes[0] == classes[1]


def test_flags_that_are_wrong_end_in_one_line(workdir):
    for arguments, words in {
        ('photo.jpg',): 'required: --workdir; see  xmixup predict --help',
        (f'--workdir={workdir}',): 'required: IMAGE',
        ('--wrokdir=x', 'a.jpg'): 'there is no flag --wrokdir, did you mean --workdir',
        (f'--workdir={workdir}', '--top=x', 'a.jpg'): 'argument --top: invalid int value',
        (f'--workdir={workdir}', '--network=last', 'a.jpg'): "'last' .choose from",
        (f'--workdir={workdir}', '-x.jpg', 'a.jpg'): 'unrecognized arguments: -x.jpg',
    }.items():
        with pytest.raises(ConfigError, match=words) as error:
            predict.run(['predict', *arguments])
        assert '\n' not in str(error.value)
