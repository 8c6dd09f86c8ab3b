"""`xmixup evaluate`: a run's network on other labelled images."""

import csv
import json
import shutil

import numpy as np
import pytest
from test_sources import write_images, write_list

from xmixup_jax import defaults, load
from xmixup_jax.cli import evaluate
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import tfds as tfds_source
from xmixup_jax.errors import DataError
from xmixup_jax.run.train import train_and_evaluate

CLASSES = ('ant', 'bee', 'cat')
SPLITS = {'train': 4, 'test': 3}


@pytest.fixture
def photos(tmp_path):
    names = [f'{s}/{c}/{i}.png' for s, n in SPLITS.items() for c in CLASSES for i in range(n)]
    write_images(tmp_path / 'photos', names, side=12)
    return tmp_path / 'photos'


@pytest.fixture
def trained(photos, config, tmp_path):
    """(folder of a run, its result)."""
    config.method, config.steps, config.eval_every = 'finetune', 2, 0
    config.target = defaults.dataset(f'folder:{photos}', 'train', 'test')
    return tmp_path / 'run', train_and_evaluate(config, tmp_path / 'run')


def evaluated(workdir, data, *flags):
    evaluate.run(['evaluate', f'--workdir={workdir}', f'--data={data}', *flags])


def read(folder):
    with (folder / 'predictions.csv').open(newline='') as file:
        return json.loads((folder / 'result.json').read_text()), list(csv.DictReader(file))


def test_a_networks_figures_on_other_images(trained, photos, tmp_path, capsys):
    workdir, of_run = trained
    # The test images of the run itself.
    evaluated(workdir, f'folder:{photos}')
    found, rows = read(workdir / 'evaluation-photos')
    for key in ('top1', 'loss', 'macro_top1', 'macro_f1'):
        assert found[key] == pytest.approx(of_run[key], rel=1e-5)
    assert found['test_images'] == of_run['test_images'] == len(rows) == 9
    with (workdir / 'predictions.csv').open(newline='') as file:
        for row, expected in zip(rows, csv.DictReader(file), strict=True):
            assert row['image'] == expected['image'] and row['predicted'] == expected['predicted']
    assert f'on 9 images of folder:{photos}' in capsys.readouterr().out
    page = (workdir / 'evaluation-photos' / 'report.html').read_text()
    assert f'{100 * found["top1"]:.2f} % top-1' in page and 'on 9 images of photos' in page
    assert page.count('<meter') == len(CLASSES)

    # Some of the classes, in a folder without splits: all images count, with the network's labels.
    other = tmp_path / 'other'
    shutil.copytree(photos / 'train/cat', other / 'cat')
    shutil.copytree(photos / 'test/ant', other / 'ant')
    evaluated(workdir, f'folder:{other}', f'--output={tmp_path / "out"}')
    found, rows = read(tmp_path / 'out')
    assert found['test_images'] == 7
    model = load(workdir)
    for row in rows:
        (prediction,) = model.predict(row['image'])
        assert (row['class'], row['predicted']) == (
            row['image'].split('/')[-2],
            prediction.class_names[0],
        )
        probabilities = dict(zip(prediction.class_names, prediction.probabilities, strict=True))
        np.testing.assert_allclose(
            [float(row[name]) for name in CLASSES],
            [probabilities[name] for name in CLASSES],
            rtol=1e-4,
        )

    # Ignored files are named, and a broken folder is not mistaken for a missing split.
    (other / 'cat/notes.txt').write_text('x')
    capsys.readouterr()
    evaluated(workdir, f'folder:{other}', f'--output={tmp_path / "out"}')
    said = capsys.readouterr().err
    assert 'model.safetensors' in said
    assert f'7 of 7 images of folder:{other}; left out: 1 .txt' in said
    above = tmp_path / 'above'
    above.mkdir()
    (above / 'other').symlink_to(other, target_is_directory=True)
    with pytest.raises(DataError, match=f'name=folder:{above}/other'):
        evaluated(workdir, f'folder:{above}')
    (other / 'cat/notes.txt').unlink()

    # A CSV file, and a split chosen by name.
    rows = [(f'{photos}/test/{c}/0.png', c, 'holdout') for c in CLASSES]
    listed = write_list(tmp_path / 'list.csv', rows, ('path', 'label', 'split'))
    evaluated(workdir, listed.name, '--split=holdout', f'--output={tmp_path / "out"}')
    assert read(tmp_path / 'out')[0]['test_images'] == 3

    # Errors: unknown classes, an unknown split, no image that can be decoded.
    (other / 'ant').rename(other / 'gnu')
    with pytest.raises(DataError, match=r"1 of 2 classes of .* \(for example 'gnu'; it has"):
        evaluated(workdir, f'folder:{other}')
    with pytest.raises(DataError, match="no split 'fold': it has test, train: name one with --spl"):
        evaluated(workdir, f'folder:{photos}', '--split=fold')
    for image in (photos / 'test').rglob('*.png'):
        image.write_bytes(b'x')
    with pytest.raises(DataError, match='none of the 9 images'):
        evaluated(workdir, f'folder:{photos}')


def test_the_test_images_of_an_undivided_folder_are_those_of_the_run(photos, config, tmp_path):
    config.method, config.steps, config.eval_every = 'finetune', 2, 0
    config.target = defaults.dataset(f'folder:{photos / "train"}', 'train', 'test')
    config.target.test_share = 0.5  # evaluate's own default would be a fifth
    result = train_and_evaluate(config, tmp_path / 'run')
    evaluated(tmp_path / 'run', config.target.name, '--split=test')
    found, rows = read(tmp_path / 'run' / 'evaluation-train')
    assert found['test_images'] == result['test_images'] == 2 * len(CLASSES)
    assert [row['image'] for row in rows] == [row['image'] for row in read(tmp_path / 'run')[1]]


def test_a_split_without_labels_is_refused(trained, tmp_path, monkeypatch):
    model = load(trained[0])
    unlabelled = Records.from_arrays(np.zeros((3, 8, 8), np.uint8), np.zeros(3, int), CLASSES)
    monkeypatch.setattr(tfds_source, 'split_labels', lambda *_: np.full(len(unlabelled), -1))
    with pytest.raises(DataError, match=r"split 'train' of mnist5k has no labels: name one with"):
        evaluate.open_labelled('mnist5k', 'train', model)
