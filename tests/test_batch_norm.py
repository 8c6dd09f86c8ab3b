"""The kinds of batch norm, and batch statistics that are re-estimated before a test."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests import torch_recipes
from tests.method_checks import CLOSE, B, D, check, nchw, normal, on_batch_axis
from xmixup_jax.checks import validate
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.augment import normalize
from xmixup_jax.compute.reestimation import population, reestimates, with_clean_statistics
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import replicate
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models.normalization import BATCH_NORMS, MOMENTUM
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights

STORED = normal(D), np.abs(normal(D, seed=1)) + 0.5


def layer(kind):
    made = BATCH_NORMS[kind](D, epsilon=1e-5, rngs=nnx.Rngs(0))
    made.mean[...], made.var[...] = STORED
    made.scale[...], made.bias[...] = normal(D, seed=2), normal(D, seed=3)
    return made


def used_statistics(kind, x):
    """The mean and variance that PyTorch's layer would normalise by."""
    stored = [torch.tensor(each) for each in STORED]
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return {
        'batch': (mean, var),
        'frozen': stored,
        'mixed': [(a + b) / 2 for a, b in zip(stored, (mean, var), strict=True)],
    }[kind]


@pytest.mark.parametrize('kind', BATCH_NORMS)
def test_training_normalises_by_the_chosen_statistics(kind):
    made, weights = layer(kind), normal(B, 3, 3, D, seed=4)

    def ours(x):
        return jnp.sum(nnx.clone(made)(x) * weights)

    def theirs(x):
        x = nchw(x)
        mean, var = (each[:, None, None] for each in used_statistics(kind, x))
        scale, bias = (torch.tensor(normal(D, seed=s))[:, None, None] for s in (2, 3))
        y = (x - mean) / torch.sqrt(var + 1e-5) * scale + bias
        return (y * nchw(torch.tensor(weights))).sum()

    check(ours, theirs, normal(B, 3, 3, D, seed=5))


@pytest.mark.parametrize('kind', BATCH_NORMS)
def test_what_a_training_step_leaves_in_the_layer(kind):
    made, x = layer(kind), normal(B, 3, 3, D, seed=5)

    def left(x):
        copy = nnx.clone(made)
        copy(x)
        return copy.mean[...], copy.var[...]

    moved = (1 - MOMENTUM) * (kind != 'frozen')
    batch = x.mean((0, 1, 2)), x.var((0, 1, 2))
    for found, old, new in zip(on_batch_axis(left)(x), STORED, batch, strict=True):
        np.testing.assert_allclose(found, (1 - moved) * old + moved * new, **CLOSE)


@pytest.mark.parametrize('kind', BATCH_NORMS)
def test_evaluation_normalises_by_the_stored_statistics(kind):
    made, x = layer(kind), normal(B, 3, 3, D, seed=5)
    made.eval()
    vectors = [torch.tensor(v) for v in (*STORED, normal(D, seed=2), normal(D, seed=3))]
    expected = F.batch_norm(nchw(torch.tensor(x)), *vectors, training=False)
    np.testing.assert_allclose(made(x), expected.permute(0, 2, 3, 1), **CLOSE)


@given(st.integers(1, 5), st.integers(2, 20), st.integers(0, 100))
def test_population_statistics_are_those_of_all_values(batches, size, seed):
    values = 3 + normal(batches, size, D, seed=seed)
    moments = [{'bn1': {'mean': part.mean(0), 'var': part.var(0)}} for part in values]
    found = population(moments)['bn1']
    expected = torch_recipes.precise_bn(
        torch.tensor(values.mean(1)), torch.tensor(values.var(1, ddof=1)), size
    )
    every = values.reshape(-1, D)
    for name, theirs, direct in zip(
        ('mean', 'var'), expected, (every.mean(0), every.var(0)), strict=True
    ):
        np.testing.assert_allclose(found[name], theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[name], direct, rtol=1e-4, atol=1e-4)


@pytest.fixture
def weights(config, tmp_path):
    """A network whose statistics differ from the initial ones."""
    config.method = 'finetune'
    _, state = step_lib.create_task(config, Sizes(10))
    moved = jax.tree.map(lambda x: x + 0.5, state.batch_stats)
    save_weights(tmp_path / 'w.safetensors', config.model.name, state.params, moved, {})
    return tmp_path / 'w.safetensors'


def statistics(path):
    return {key: x for key, x in load_file(path).items() if '.running_' in key}


def test_frozen_statistics_are_the_pretrained_ones_throughout(config, weights, tmp_path):
    config.method, config.weights, config.batch_norm = 'xmixup', str(weights), 'frozen'
    train_and_evaluate(config, tmp_path / 'run')
    found, stored = statistics(tmp_path / 'run' / 'model.safetensors'), statistics(weights)
    assert found.keys() == stored.keys() and len(found) > 5
    for key in found:
        np.testing.assert_array_equal(found[key], stored[key])
    ours, theirs = load_file(tmp_path / 'run' / 'model.safetensors'), load_file(weights)
    assert not np.allclose(ours['bn1.weight'], theirs['bn1.weight'])  # the scale is trained


def clean_first_layer(config, records, kernel):
    """Mean and variance of the first convolution's output over clean training crops."""
    batches = iter(
        train_batches(
            Data(records, None, None),
            None,
            seed=config.seed + 1,  # not the crops of the run
            batch_size=config.batch_size,
            resize=config.resize,
            num_threads=1,
        )
    )
    images = np.concatenate([next(batches)['image'] for _ in range(40)])
    corner = np.random.default_rng(0).integers(0, config.resize - config.image_size + 1, 2)
    top, left = corner
    images = images[:, top : top + config.image_size, left : left + config.image_size]
    x = nchw(torch.tensor(np.asarray(normalize(images, config.model))))
    maps = F.conv2d(x, torch.tensor(kernel), padding=1)
    return maps.mean((0, 2, 3)).numpy(), maps.var((0, 2, 3)).numpy()


@pytest.mark.parametrize('kind', ['batch', pytest.param('mixed', marks=pytest.mark.slow)])
def test_statistics_are_those_of_clean_images_after_training_on_mixed_ones(
    config, records, weights, tmp_path, kind
):
    config.method, config.weights, config.batch_norm = 'xmixup', str(weights), kind
    config.update({'steps': 60, 'batch_size': 32, 'checkpoint_every': 60})
    config.xmixup.alpha = 2.0
    train_and_evaluate(config, tmp_path / 'run')
    trained = load_file(tmp_path / 'run' / 'model.safetensors')
    mean, var = clean_first_layer(config, records[0], trained['conv1.weight'])
    if kind == 'mixed':
        mean, var = (mean + 0.5) / 2, (var + 1.5) / 2  # the stored ones are 0.5 and 1.5
    ratio = var / trained['bn1.running_var']
    np.testing.assert_allclose(ratio, 1, atol=0.02)
    np.testing.assert_allclose(trained['bn1.running_mean'], mean, atol=0.02 * np.sqrt(var).max())
    if kind == 'batch':
        config.reestimate = 0
        train_and_evaluate(config, tmp_path / 'raw')
        raw = load_file(tmp_path / 'raw' / 'model.safetensors')
        np.testing.assert_array_equal(raw['conv1.weight'], trained['conv1.weight'])
        assert (var / raw['bn1.running_var']).mean() > 1.1  # mixed images vary less


def test_a_resumed_run_tests_and_keeps_the_same_statistics(config, weights, tmp_path):
    config.method, config.weights, config.batch_norm = 'xmixup', str(weights), 'mixed'
    config.eval_every = 2
    whole = train_and_evaluate(config, tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
    for name in ('result.json', 'model.safetensors'):
        (tmp_path / 'again' / name).unlink()
    again = train_and_evaluate(config, tmp_path / 'again')
    assert again['loss'] == whole['loss']
    for name in ('model.safetensors', 'best_model.safetensors'):
        ours, theirs = (load_file(tmp_path / run / name) for run in ('whole', 'again'))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.devices
def test_one_and_many_devices_estimate_the_same_statistics(config, records):
    config.update({'method': 'mixup', 'reestimate': 3})
    task, state = step_lib.create_task(config, Sizes(10))
    found = with_clean_statistics(task, config, replicate(state), records[0]).batch_stats
    batches = train_batches(
        Data(records[0], None, None),
        None,
        seed=config.seed,
        batch_size=config.batch_size,
        resize=config.resize,
        num_threads=1,
    )
    step = jax.vmap(partial(step_lib.moments_step, task, state), axis_name='batch')
    iterator = iter(batches)
    moments = [
        jax.tree.map(lambda x: x[0], step(jax.tree.map(lambda x: x[None], next(iterator))))
        for _ in range(3)
    ]
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, found, population(moments))


@pytest.mark.parametrize(
    ('method', 'kind', 'expected'),
    [
        ('finetune', 'batch', False),
        ('xmixup', 'batch', True),
        ('cotrain', 'batch', True),
        ('xmixup', 'frozen', False),
        ('finetune', 'mixed', True),
    ],
)
def test_who_gets_new_statistics(config, method, kind, expected):
    config.method, config.batch_norm = method, kind
    assert reestimates(config) == expected
    config.reestimate = 0
    assert reestimates(config) == (kind == 'mixed')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_norm': 'frozen'}, r"config.weights='' is a random network"),
        ({'batch_norm': 'mixed', 'weights': 'source', 'reestimate': 0}, 'reestimate > 0'),
        ({'batch_norm': 'frozen', 'weights': 'source', 'method': 'stochnorm'}, 'own batch norm'),
        ({'batch_norm': 'no'}, 'must be one of batch, frozen, mixed'),
        ({'head_init': 'no'}, 'must be one of uniform, normal, zero'),
    ],
)
def test_impossible_choices_are_refused(config, changes, message):
    config.update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
