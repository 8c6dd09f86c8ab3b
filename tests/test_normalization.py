"""Batch norm with its residual sum and activation, and max pooling, against PyTorch's autograd."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.method_checks import CLOSE, check, nchw, normal
from xmixup_jax.compute.step import create_task, train_step
from xmixup_jax.devices import device_groups, replicate
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced
from xmixup_jax.models import normalization, pooling
from xmixup_jax.models.normalization import (
    SLOPES,
    Moments,
    normalize,
    normalize_on_gpu,
    over_devices,
)
from xmixup_jax.models.pooling import max_pool

B, C = 4, 3
EPSILON = 1e-3
STORED = Moments(normal(C), np.abs(normal(C, seed=1)) + 0.5)
X = 2 + 3 * normal(B, 5, 4, C, seed=2)
RESIDUAL = normal(B, 5, 4, C, seed=3)
SCALE, BIAS = 1 + normal(C, seed=4), normal(C, seed=5)
GRAD = normal(B, 5, 4, C, seed=6)
WEIGHTS = {'batch': 1.0, 'stored': 0.0, 'mixed': 0.5, 'by channel': np.float32([1, 0, 0.3])}


def torch_layer(x, residual, scale, bias, weight, act):
    """Its autograd goes through the statistics."""
    var, mean = torch.var_mean(x, dim=(0, 1, 2), correction=0)
    weight = torch.tensor(weight)
    mean, var = (
        weight * new + (1 - weight) * torch.tensor(old)
        for new, old in zip((mean, var), STORED, strict=True)
    )
    y = (x - mean) / torch.sqrt(var + EPSILON) * scale + bias
    y = y if residual is None else y + residual
    return {'': lambda y: y, 'relu': F.relu, 'relu6': F.relu6}[act](y)


FORMS = (normalize, normalize_on_gpu)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('act', SLOPES)
@pytest.mark.parametrize('weight', WEIGHTS)
@pytest.mark.parametrize('has_residual', [False, True])
def test_value_and_gradients_are_those_of_autograd(form, act, weight, has_residual):
    weight = WEIGHTS[weight]

    def ours(x, scale, bias, residual=None):
        out, _ = form(act, EPSILON, None, x, residual, scale, bias, STORED, jnp.asarray(weight))
        return jnp.sum(out * GRAD)

    def theirs(x, scale, bias, residual=None):
        return (torch_layer(x, residual, scale, bias, weight, act) * torch.tensor(GRAD)).sum()

    check(ours, theirs, X, SCALE, BIAS, *([RESIDUAL] if has_residual else []))


@pytest.mark.parametrize('act', SLOPES)
def test_it_returns_the_statistics_of_the_batch(act):
    def moments(x):
        return normalize(act, EPSILON, None, x, None, SCALE, BIAS, STORED, jnp.ones(()))[1]

    found = jax.vmap(moments, axis_name='batch')(X[None])
    np.testing.assert_allclose(found.mean[0], X.mean((0, 1, 2)), **CLOSE)
    np.testing.assert_allclose(found.var[0], X.var((0, 1, 2)), **CLOSE)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('act', SLOPES)
def test_devices_share_their_statistics(form, act):
    """Two devices with half of the batch each: gradients of the sum of both losses."""

    def loss(x, residual, grad):
        out, _ = form(act, EPSILON, None, x, residual, SCALE, BIAS, STORED, jnp.ones(()))
        return jnp.sum(out * grad)

    halves = [a.reshape(2, B // 2, *a.shape[1:]) for a in (X, RESIDUAL, GRAD)]
    grads = jax.vmap(jax.grad(loss, (0, 1)), axis_name='batch')(*halves)
    x, residual = (torch.tensor(a, requires_grad=True) for a in (X, RESIDUAL))
    out = torch_layer(x, residual, *map(torch.tensor, (SCALE, BIAS)), 1.0, act)
    (out * torch.tensor(GRAD)).sum().backward()
    for found, expected in zip(grads, (x, residual), strict=True):
        np.testing.assert_allclose(found.reshape(X.shape), expected.grad, **CLOSE)


@pytest.mark.devices
@pytest.mark.parametrize('form', FORMS)
def test_statistics_stay_within_groups_of_devices(form):
    """Each half of the devices is a network of its own to PyTorch."""
    count = jax.device_count()
    half = tuple(range(count // 2))
    groups = (half, tuple(i + count // 2 for i in half))
    x, grad = normal(count, 2, 3, 3, C, seed=7), normal(count, 2, 3, 3, C, seed=8)

    def loss(x, grad):
        affine = jnp.asarray(SCALE), jnp.asarray(BIAS)
        out, batch = form('relu', EPSILON, groups, x, None, *affine, STORED, jnp.ones(()))
        return jnp.sum(out * grad), batch

    found, batch = jax.pmap(jax.grad(loss, has_aux=True), axis_name='batch')(x, grad)
    for group in groups:
        own = torch.tensor(x[list(group)].reshape(-1, 3, 3, C), requires_grad=True)
        out = torch_layer(own, None, *map(torch.tensor, (SCALE, BIAS)), 1.0, 'relu')
        (out * torch.tensor(grad[list(group)].reshape(out.shape))).sum().backward()
        for i, expected in zip(group, own.grad.split(2), strict=True):
            np.testing.assert_allclose(found[i], expected, **CLOSE)
            np.testing.assert_allclose(batch.mean[i], own.mean((0, 1, 2)).detach(), **CLOSE)


def test_groups_of_devices(monkeypatch):
    owners = [types.SimpleNamespace(process_index=i) for i in (0, 1, 0, 1)]
    monkeypatch.setattr(jax, 'devices', lambda: owners)
    assert device_groups('all') is None
    assert device_groups('host') == ((0, 2), (1, 3))
    assert device_groups('device') == ((0,), (1,), (2,), (3,))
    monkeypatch.setattr(jax, 'devices', lambda: owners[:1])
    assert device_groups('host') is None and device_groups('device') is None


@pytest.mark.devices
def test_a_step_whose_devices_have_their_own_statistics(config):
    """Each device then sees a batch of its own, as in a run on it alone."""
    config.update({'method': 'finetune', 'batch_norm_over': 'device', 'flip': False})
    config.resize = config.image_size
    count, sizes = jax.device_count(), Sizes(10)
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (count, 4, *[config.resize] * 2, 3), np.uint8),
        'label': rng.integers(0, 10, (count, 4)).astype(np.int32),
        'seed': rng.integers(0, 2**32, (count, 4), np.uint32),
    }
    task, state = create_task(config, sizes)
    arrays = jax.tree.map(lambda x: x[:, None], batch)
    constants = with_traced({}, config)
    new, metrics = task.train_steps(constants, replicate(state), {}, arrays)
    config.batch_norm_over = 'all'
    alone, _ = create_task(config, sizes)
    one = jax.jit(jax.vmap(partial(train_step, alone, constants, state), axis_name='batch'))
    apart = [one(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(count)]
    losses = [each['loss'][0] for _, each in apart]
    np.testing.assert_allclose(metrics['loss'][0], np.mean(losses), rtol=1e-5)
    assert np.std(losses) > 1e-3
    means = jax.tree.map(lambda *x: np.mean([each[0] for each in x], 0), *[s for s, _ in apart])
    for ours, theirs in zip(
        jax.tree.leaves((new.params, new.batch_stats)),
        jax.tree.leaves((means.params, means.batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_bfloat16_differs_by_its_rounding_alone(form):
    def loss(x, residual):
        out, _ = form('relu', EPSILON, None, x, residual, SCALE, BIAS, STORED, jnp.ones(()))
        return jnp.sum(out.astype(jnp.float32) * GRAD), out

    def both(x, residual):
        return jax.vmap(jax.value_and_grad(loss, (0, 1), has_aux=True), axis_name='batch')(
            x[None], residual[None]
        )

    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (X, RESIDUAL)]
    (_, out), grads = both(*narrow)
    assert {out.dtype, *(grad.dtype for grad in grads)} == {jnp.dtype(jnp.bfloat16)}
    (_, wide), expected = both(*(a.astype(jnp.float32) for a in narrow))
    for found, exact in zip((out, *grads), (wide, *expected), strict=True):
        exact = np.asarray(exact)
        error = np.abs(np.asarray(found, np.float32) - exact)
        # Kept bits: 8. Where the sum is at the ReLU's kink, rounding may decide.
        assert np.mean(error <= 2**-7 * (np.abs(exact) + 1)) > 0.98


@pytest.mark.parametrize('act', ['relu', 'relu6'])
def test_slopes_are_those_of_pytorch_at_kinks_too(act):
    smallest = np.finfo(np.float32).tiny  # smaller ones are 0 to XLA
    points = np.float32([-np.inf, -7, -smallest, 0, smallest, 1e-9, 0.5, 5.99, 6, 6.01, np.inf])
    x = torch.tensor(points, requires_grad=True)
    {'relu': F.relu, 'relu6': F.relu6}[act](x).sum().backward()
    np.testing.assert_array_equal(SLOPES[act](jnp.asarray(points)), x.grad)


@pytest.fixture(params=['cpu', 'tpu'])
def pool(request, monkeypatch):
    """Max pooling in the form for a platform."""
    monkeypatch.setattr(jax, 'default_backend', lambda: request.param)
    return max_pool


@pytest.mark.parametrize('window', [(3, 2, 1), (3, 2, 0), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize('size', [(7, 7), (6, 9)])
def test_max_pool_is_that_of_pytorch_with_ties(pool, window, size):
    side, stride, padding = window
    # Few values, so that most windows have several maxima.
    x = np.random.default_rng(0).integers(-2, 3, (2, *size, 3)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    expected = F.max_pool2d(nchw(tensor), side, stride, padding)
    out, back = jax.vjp(lambda x: pool(x, side, stride, padding), jnp.asarray(x))
    for found in (out, pool(jnp.asarray(x), side, stride, padding)):
        np.testing.assert_array_equal(found, expected.detach().permute(0, 2, 3, 1))
    grad = normal(*out.shape)
    expected.backward(nchw(torch.tensor(grad)))
    np.testing.assert_allclose(back(grad)[0], tensor.grad, rtol=1e-6, atol=1e-6)


def test_max_pool_passes_nan_on(pool):
    x = normal(1, 6, 6, 2)
    x[0, 2, 3, 1] = np.nan
    expected = F.max_pool2d(nchw(torch.tensor(x)), 3, 2, 1).permute(0, 2, 3, 1)
    out, _ = jax.vjp(lambda x: pool(x, 3, 2, 1), jnp.asarray(x))
    for found in (out, pool(jnp.asarray(x), 3, 2, 1)):
        np.testing.assert_array_equal(found, expected)


def test_a_gpus_network_learns_as_a_tpus(config, monkeypatch):
    """A step of the whole network in the forms for either."""
    config.update_from_flattened_dict({'method': 'finetune', 'model.stem': 'imagenet'})
    config.resize = config.image_size = 32
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (1, 8, 32, 32, 3), np.uint8),
        'label': rng.integers(0, 10, (1, 8)).astype(np.int32),
        'seed': rng.integers(0, 2**32, (1, 8), np.uint32),
    }
    task, state = create_task(config, Sizes(10))
    used = set()

    def spy(module, name):
        form = getattr(module, name)

        def recorded(*args):
            used.add(name)
            return form(*args)

        monkeypatch.setattr(module, name, recorded)

    spy(normalization, 'normalize_on_gpu')
    spy(pooling, 'max_pool_with_positions')

    def step(platform):
        monkeypatch.setattr(jax, 'default_backend', lambda: platform)
        step = partial(train_step, task, with_traced({}, config), state)
        return jax.jit(jax.vmap(step, axis_name='batch'))(batch)

    expected, usual = step('tpu')
    assert not used
    new, metrics = step('gpu')
    assert used == {'normalize_on_gpu', 'max_pool_with_positions'}
    np.testing.assert_allclose(metrics['loss'], usual['loss'], rtol=1e-5)
    scale = float(config.optimizer.learning_rate)
    for (path, ours), theirs, old in zip(
        jax.tree.leaves_with_path(new.params),
        jax.tree.leaves(expected.params),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        gradients = [(x[0] - old) / scale for x in (ours, theirs)]
        size = np.abs(gradients[1]).max()
        np.testing.assert_allclose(*gradients, atol=1e-3 * size + 1e-5, err_msg=str(path))


def test_moments_of_several_devices_are_those_of_all_their_images():
    x = np.random.default_rng(0).normal(size=(4, 6, 5)) + np.arange(4)[:, None, None]
    moments = {'bn1': {'mean': x.mean(1), 'var': x.var(1)}}
    found = jax.vmap(over_devices, axis_name='batch')(moments)['bn1']
    for part, expected in (('mean', x.mean((0, 1))), ('var', x.var((0, 1)))):
        np.testing.assert_allclose(found[part], np.tile(expected, (4, 1)), rtol=1e-5)
