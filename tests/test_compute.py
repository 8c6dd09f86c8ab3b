"""Precision, accumulation and rematerialisation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from test_step import SIZES, one_and_many_devices, random_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_networks import peer

from benchmarks import kernels
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.cost import gflop
from xmixup_jax.methods.find import with_traced
from xmixup_jax.models import create_model, forward


def updated(config, batch):
    """(state before, state after, metrics) of a step on one device."""
    task, before = step_lib.create_task(config, SIZES)
    after, metrics = one_and_many_devices(
        task, with_traced({}, config), before, [batch], counts=(1,)
    )[0]
    return before, after, metrics


def update(before, after):
    """The change of all parameters, one vector."""
    change = jax.tree.map(lambda a, b: np.ravel(a - np.asarray(b)), after.params, before.params)
    return np.concatenate(jax.tree.leaves(change))


@pytest.mark.parametrize(
    ('name', 'side'), [('resnet18', 224), pytest.param('vit_s16', 224, marks=pytest.mark.slow)]
)
def test_operations_are_counted_as_pytorch_counts_them(name, side):
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    graphdef, *shapes = nnx.eval_shape(lambda: create_model(config, 7, side, 0))

    def loss(params, batch_stats, images):
        return forward(graphdef, params, batch_stats, images, train=True)[0].logits.sum()

    mapped = jax.vmap(jax.grad(loss), (None, None, 0), axis_name='batch')
    images = jax.ShapeDtypeStruct((1, 2, side, side, 3), jnp.float32)
    ours = gflop(mapped, *shapes, images)
    network = peer(name, 7, side).train()
    # PyTorch counts the products of attention only if they are plain matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(2, 3, side, side)).sum().backward()
    # XLA also counts additions and the like, but not products with zero padding.
    assert ours == pytest.approx(counter.get_total_flops() / 1e9, rel=0.08)


def test_kernels_are_told_by_what_they_were_made_of(tmp_path):
    def loss(weights, x):
        return jnp.tanh(x @ weights).sum()

    shapes = [jnp.ones((300, 200)), jnp.ones((400, 300))]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    compiled(*shapes)
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            jax.block_until_ready(compiled(*shapes))
    trace = next(tmp_path.rglob('*.xplane.pb'))
    profile = jax.profiler.ProfileData.from_file(str(trace))
    made_of = kernels.origins(compiled.as_text())
    seen = {made_of[name] for name, ms in kernels.kernels_of(profile) if name in made_of and ms > 0}
    assert {('forward', 'dot_general'), ('forward', 'tanh')} <= seen
    # XLA may fuse the product of the gradient with a transposition, and name it after that.
    assert {('backward', 'dot_general'), ('backward', 'transpose')} & seen


@pytest.mark.parametrize(
    ('name', 'side'),
    [
        ('resnet18', 32),
        pytest.param('efficientnet_lite0', 32, marks=pytest.mark.slow),
        ('vit_s16', 32),
        ('convnext4', 32),
        ('dinov2_4', 28),
        ('clip4', 32),
    ],
)
def test_all_products_but_the_heads_are_bfloat16(name, side):
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    graphdef, *shapes = nnx.eval_shape(
        lambda: create_model(config, 7, side, 0, precision='bfloat16')
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}

    def loss(params, batch_stats, images):
        outputs, batch_stats = forward(graphdef, params, batch_stats, images, train=True)
        assert {leaf.dtype for leaf in outputs.stages} == {jnp.dtype('float32')}
        return outputs.logits.sum(), batch_stats

    mapped = jax.vmap(jax.grad(loss, has_aux=True), (None, None, 0), axis_name='batch')
    images = jax.ShapeDtypeStruct((1, 2, side, side, 3), jnp.float32)
    lowered = jax.jit(mapped).lower(*shapes, images)
    results = jax.tree.leaves(lowered.out_info)
    assert {leaf.dtype for leaf in results} == {jnp.dtype('float32')}
    products = re.findall(
        r'stablehlo\.(?:convolution|dot_general)\b.*: \((.*)\) ->', lowered.as_text()
    )
    wide = [types for types in products if 'bf16' not in types]
    assert len(products) > 40
    # Those of the head: forward, and the gradients by features and weights. (Attention computes its
    # softmax in float32, so its gradient has products of both types.)
    assert len(wide) <= 3 and all('x7xf32' in types for types in wide)


def test_bfloat16_steps_in_nearly_the_same_direction(config):
    batch = random_batch(16)
    before, exact, exact_metrics = updated(config, batch)
    config.precision = 'bfloat16'
    _, rounded, metrics = updated(config, batch)
    a, b = update(before, exact), update(before, rounded)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert 0.97 < cosine < 1.0
    np.testing.assert_allclose(metrics['loss'], exact_metrics['loss'], rtol=0.02)
    assert metrics['loss'].dtype == np.float32


def test_rematerialisation_changes_nothing(config):
    config.method = 'stochnorm'  # its norm layers draw at random, the same both times
    batch = random_batch(16)
    before, kept, _ = updated(config, batch)
    config.remat = True
    again = updated(config, batch)[1]
    np.testing.assert_allclose(update(before, again), update(before, kept), rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept.batch_stats, again.batch_stats)


@pytest.mark.parametrize('method', ['bituning', 'dtnh'])
def test_accumulating_equal_parts_is_the_step_on_one_part(config, method):
    """The gradient is the mean of two equal ones; the statistics are updated twice."""
    config.method = method
    half = random_batch(8)
    task, state = step_lib.create_task(config, SIZES)
    constants = {}
    if method == 'dtnh':
        state.params = jax.tree.map(np.asarray, state.params)
        constants = {'params': jax.tree.map(lambda x: x + 0.01, state.params)}
    if method == 'bituning':
        rng = np.random.default_rng(0)
        config.bituning.queue = 40
        h, z = (rng.normal(size=(10, 40, d)).astype(np.float32) for d in (9, 128))
        state.memory = {'params': state.params, 'h': h, 'z': z, 'next': np.zeros(10, np.int32)}
    constants = with_traced(constants, config)
    one, _ = one_and_many_devices(task, constants, state, [half], counts=(1,))[0]
    config.accumulate_steps = 2
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), half)
    task, _ = step_lib.create_task(config, SIZES)
    two, _ = one_and_many_devices(task, constants, state, [doubled], counts=(1,))[0]
    # The optimiser sees a single update.
    assert int(two.step) == 1
    np.testing.assert_allclose(update(state, two), update(state, one), rtol=1e-3, atol=1e-6)

    def moved_twice(old, once, twice):
        np.testing.assert_allclose(twice - once, 0.9 * (once - old), rtol=1e-3, atol=1e-5)

    jax.tree.map(moved_twice, state.batch_stats, one.batch_stats, two.batch_stats)
