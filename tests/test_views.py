"""Tests and predictions average several views of an image."""

import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from torch_networks import torchvision

import xmixup_jax
from xmixup_jax.checks import validate
from xmixup_jax.cli import evaluate as evaluate_command
from xmixup_jax.cli import export, predict
from xmixup_jax.compute import augment
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.compute.views import over_views
from xmixup_jax.config import pretrain_config
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import train_and_test
from xmixup_jax.devices import replicate
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import forward
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights

R, S, K = 14, 8, 10
IMAGES = np.random.default_rng(0).integers(256, size=(6, R, R, 3), dtype=np.uint8)
CLASSES = tuple('abcdefghij')


def views_of_torchvision(images, size, views):
    """[V, B, S, S, 3]."""
    images = torch.tensor(images).permute(0, 3, 1, 2)
    crops = torchvision.transforms.functional.ten_crop(images, size)
    if views < 10:
        middle = crops[4]
        crops = (middle, torchvision.transforms.functional.hflip(middle))[:views]
    return torch.stack(crops).permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.parametrize('views', [1, 2, 10])
def test_the_mean_of_the_probabilities_of_torchvisions_crops(config, views):
    config.update({'resize': R, 'image_size': S, 'test_views': views})
    weights = np.random.default_rng(1).normal(size=(S * S * 3, K)).astype(np.float32) / 10

    def logits_of(crops):
        return crops.reshape(len(crops), -1) @ weights

    ours = over_views(config, logits_of, jnp.asarray(IMAGES))
    crops = views_of_torchvision(IMAGES, S, views)
    logits = [np.asarray(logits_of(augment.normalize(each, config.model))) for each in crops]
    expected = softmax(np.array(logits, np.float64), axis=2).mean(0)
    np.testing.assert_allclose(
        np.exp(ours if views > 1 else np.log(softmax(ours, 1))), expected, rtol=1e-4
    )
    assert ours.dtype == jnp.float32


@pytest.fixture
def trained(config, tmp_path):
    """(configuration, state, folder) of a run with ten views and random weights."""
    config.update({'resize': 36, 'image_size': 28, 'test_views': 10})
    _, state = step_lib.create_task(config, Sizes(K, 3))
    (tmp_path / 'run').mkdir()
    content = {'class_names': CLASSES, 'config': config.to_dict()}
    path = tmp_path / 'run' / 'model.safetensors'
    save_weights(path, config.model.name, state.params, state.batch_stats, content)
    return config, state, path.parent


def records(n=20):
    images = np.random.default_rng(2).integers(256, size=(n, 36, 36, 3), dtype=np.uint8)
    return images, Records.from_arrays(images, np.arange(n) % K, CLASSES)


def test_test_evaluate_and_predict_see_the_same_views(trained):
    config, state, folder = trained
    images, labelled = records()
    task, _ = step_lib.create_task(config, Sizes(K, 3))
    tested = evaluate(task, config, replicate(state), labelled)
    logits = []
    for crops in views_of_torchvision(images, 28, 10):
        seen = augment.normalize(crops, config.model)
        outputs, _ = forward(task.graphdef, state.params, state.batch_stats, seen, train=False)
        logits.append(np.asarray(outputs.logits[:, :K], np.float64))
    expected = softmax(np.array(logits), axis=2).mean(0)
    model = xmixup_jax.load(folder)
    for each in (tested, model.test(labelled, batch_size=8)):
        np.testing.assert_allclose(np.exp(each.logits), expected, rtol=1e-3)
    for prediction, row in zip(model.predict(images), expected, strict=True):
        np.testing.assert_allclose(prediction.probabilities, -np.sort(-row), rtol=1e-3)


def test_views_of_the_command_line_come_first(trained, capsys, tmp_path):
    _, _, folder = trained
    images, _ = records(1)
    photo = tmp_path / 'photo.png'
    Image.fromarray(images[0]).save(photo)
    for views in (1, 2, 10):
        predict.run(
            ['', f'--workdir={folder}', f'--views={views}', '--format=csv', '--top=1', str(photo)]
        )
        (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
        (expected,) = xmixup_jax.load(folder, views=views).predict(images)
        assert row['probability'] == f'{expected.probabilities[0]:.6f}'


def test_evaluate_says_how_many_views(trained, tmp_path, capsys):
    _, _, folder = trained
    images, _ = records(4)
    for i, image in enumerate(images):
        place = tmp_path / 'data' / CLASSES[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f'{i}.png')
    command = ['', f'--workdir={folder}', f'--data=folder:{tmp_path / "data"}']
    for flags, views in (([], 10), (['--views=2'], 2)):
        evaluate_command.run([*command, *flags, f'--output={tmp_path / "out"}'])
        assert json.loads((tmp_path / 'out' / 'result.json').read_text())['views'] == views


@pytest.mark.parametrize('views', [0, 3])
def test_other_numbers_are_refused(trained, views):
    config, _, folder = trained
    with pytest.raises(ConfigError, match=f'views={views}: must be 1, 2 or 10'):
        xmixup_jax.load(folder, views=views)
    with pytest.raises(ConfigError, match='views'):
        predict.run(['', f'--workdir={folder}', f'--views={views}', 'x.png'])
    config.test_views = views
    with pytest.raises(ConfigError, match=rf'config\.test_views={views}: must be 1, 2 or 10'):
        validate(config, 1)


def test_networks_of_earlier_versions_have_one_view(trained):
    config, state, folder = trained
    stored = config.to_dict()
    del stored['fit'], stored['test_views'], stored['augment']
    path = folder / 'model.safetensors'
    content = {'class_names': CLASSES, 'config': stored}
    save_weights(path, config.model.name, state.params, state.batch_stats, content)
    model = xmixup_jax.load(folder)
    assert (model.config.fit, model.config.test_views) == ('crop', 1)
    assert len(model.predict(records(1)[0])) == 1


def test_an_exported_network_has_one_view(trained, tmp_path):
    _, _, folder = trained
    images, _ = records(2)
    export.export(xmixup_jax.load(folder), 'stablehlo', tmp_path / 'out')
    exported = jax.export.deserialize((tmp_path / 'out').read_bytes())
    described = json.loads((tmp_path / 'out.json').read_text())
    assert (described['resize'], described['image_size'], described['fit']) == (36, 28, 'crop')
    logits = np.asarray(exported.call(augment.center_crop(images, 28)))
    middle = xmixup_jax.load(folder, views=1).predict(images)
    np.testing.assert_allclose(
        softmax(logits, 1).max(1), [p.probabilities[0] for p in middle], rtol=1e-4
    )


def test_a_run_tests_with_its_views(config, tmp_path):
    config.update(
        {'method': 'finetune', 'steps': 2, 'test_views': 2, 'resize': 16, 'image_size': 14}
    )
    result = train_and_evaluate(config, tmp_path / 'run')
    model = xmixup_jax.load(tmp_path / 'run')
    _, test = train_and_test(config.target, config)
    assert model.test(test).metrics['loss'] == pytest.approx(result['loss'], rel=1e-4)
    one = xmixup_jax.load(tmp_path / 'run', views=1).test(test).metrics['loss']
    assert one != pytest.approx(result['loss'], rel=1e-4)


def test_networks_trained_on_the_source_serve_runs_with_any_views_and_augmentation(config):
    plain = pretrain_config(config).to_dict()
    config.update({'test_views': 10})
    config.augment.update({'policy': 'randaugment', 'erasing': 0.5})
    assert pretrain_config(config).to_dict() == plain
