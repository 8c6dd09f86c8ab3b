"""Fine-tuning, and methods that have their own heads, layers, queues or phases."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from tests import torch_recipes
from tests.method_checks import (
    CLOSE,
    K_0,
    LABELS_T,
    B,
    D,
    K,
    check,
    make_view,
    nchw,
    normal,
    on_batch_axis,
    outputs,
)
from xmixup_jax.compute.state import TrainState
from xmixup_jax.matching import class_similarity, domain_similarity
from xmixup_jax.methods import (
    METHODS,
    bituning,
    cotuning,
    lwf,
    rifle,
)
from xmixup_jax.methods.stochnorm import StochNorm
from xmixup_jax.models.base import HEAD_INITS, draw_head


def test_finetune():
    check(
        lambda z: METHODS['finetune'].loss(make_view('finetune', outputs=outputs(z))),
        lambda z: F.cross_entropy(z, LABELS_T),
        normal(B, K),
    )


def test_lwf():
    teacher = normal(B, K_0, seed=1)

    def ours(logits):
        view = make_view('lwf', outputs=outputs(logits), taught=jnp.asarray(teacher))
        view.options.update(weight=0.6, temperature=3.0)
        return lwf.loss(view)

    # The public loss is a divergence, which is smaller by the teacher's entropy, a constant.
    entropy = scipy.stats.entropy(scipy.special.softmax(teacher / 3, axis=1), axis=1).mean()

    def theirs(logits):
        kept = torch_recipes.lwf_loss(logits[:, K:], torch.tensor(teacher), 3) + entropy
        return F.cross_entropy(logits[:, :K], LABELS_T) + 0.6 * kept

    check(ours, theirs, normal(B, K + K_0))


def test_stochnorm():
    key, p = jax.random.key(5), 0.5
    layer = StochNorm(D, p=p, epsilon=1e-5, rngs=nnx.Rngs(0))
    mean, var = normal(D), np.abs(normal(D, seed=1)) + 0.5
    layer.mean[...], layer.var[...] = mean, var
    layer.key = key
    chosen = torch.tensor(np.asarray(jax.random.bernoulli(key, p, (D,))))
    assert chosen.any() and not chosen.all()
    weights = normal(B, 3, 3, D, seed=2)
    scale, bias = normal(D, seed=3), normal(D, seed=4)
    layer.scale[...], layer.bias[...] = scale, bias
    running = []

    def ours(x):
        copy = nnx.clone(layer)
        copy.key = key
        y = copy(x)
        return jnp.sum(y * weights)

    def theirs(x):
        vectors = [torch.tensor(vector) for vector in (mean, var, scale, bias)]
        y, *moved = torch_recipes.stochnorm2d(nchw(x), *vectors, chosen)
        running.extend(moved)
        return (y * nchw(torch.tensor(weights))).sum()

    x = normal(B, 3, 3, D)
    check(ours, theirs, x)

    def statistics(x):
        copy = nnx.clone(layer)
        copy.key = key
        copy(x)
        return copy.mean[...], copy.var[...]

    stats = on_batch_axis(statistics)(x)
    for found, expected in zip(stats, running, strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)


def test_stochnorm_evaluates_like_batch_norm():
    layer = StochNorm(D, p=0.5, epsilon=1e-5, rngs=nnx.Rngs(0))
    layer.eval()
    x = normal(B, D)
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), **CLOSE)


def test_cotuning_relationship_and_loss():
    logits, labels = normal(12, K_0), np.arange(12) % K
    table = cotuning.relationship(logits, labels, K, temperature=1.5)
    of_public_code = torch_recipes.cotuning_relationship(
        torch.tensor(logits), torch.tensor(labels), K, scale=1 / 1.5
    )
    np.testing.assert_allclose(table, of_public_code, **CLOSE)
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-6)

    def ours(z):
        view = make_view('cotuning', outputs=outputs(z), constants={'relationship': table})
        return cotuning.loss(view)

    def theirs(z):
        source = torch_recipes.cotuning_loss(z[:, K:], torch.tensor(table), LABELS_T)
        return F.cross_entropy(z[:, :K], LABELS_T) + 2.3 * source

    check(ours, theirs, normal(B, K + K_0))


def test_cotuning_finds_the_temperature_that_made_the_labels():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20000, K_0)) * 2
    labels = (true + rng.gumbel(size=true.shape)).argmax(1)  # drawn from softmax(true)
    np.testing.assert_allclose(cotuning.fit_temperature(true * 2.5, labels), 2.5, rtol=0.05)


def test_bituning():
    """Both contrasts, and the queue, to which this batch's keys are added between them."""
    queue, dim = 3, 7
    places = np.array([0, 2, 1, 0], np.int32)
    memory = {'h': normal(K, queue, D + 1), 'z': normal(K, queue, dim)}
    memory = {k: v / np.linalg.norm(v, axis=-1, keepdims=True) for k, v in memory.items()}
    key_h, key_z = normal(B, D + 1, seed=1), normal(B, dim, seed=1)
    key_h, key_z = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (key_h, key_z))
    kernel, bias = normal(D, K + dim), normal(K + dim)
    parts = {
        'taught': {'h': jnp.asarray(key_h), 'z': jnp.asarray(key_z)},
        'memory': jax.tree.map(jnp.asarray, memory | {'next': places}),
        'params': {'fc': {'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}},
    }

    def ours(features, logits):
        return bituning.loss(make_view('bituning', outputs=outputs(logits, features), **parts))

    queues = []

    def theirs(features, logits):
        h, z = torch_recipes.bituning_encode(features, logits[:, K:])
        head = torch.tensor(kernel).T[:K], torch.tensor(bias)[:K]
        before = [torch.tensor(x) for x in (memory['h'], memory['z'], places)]
        keys = torch.tensor(key_h), torch.tensor(key_z)
        *losses, after = torch_recipes.bituning_losses(h, z, *keys, LABELS_T, *head, before)
        queues.extend(after)
        constants = 2 * np.log(queue + 1)
        return F.cross_entropy(logits[:, :K], LABELS_T) + sum(losses) + constants

    check(ours, theirs, normal(B, D), normal(B, K + dim))
    after = on_batch_axis(lambda _: bituning.enqueued(make_view('bituning', **parts)))(0)
    for found, expected in zip((after['h'], after['z'], after['next']), queues, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=6))
def test_bituning_queue_is_a_ring_for_each_class(batches):
    length = 4
    rings = [deque(maxlen=length) for _ in range(3)]
    memory = {'h': np.zeros((3, length, 1), np.float32), 'z': np.zeros((3, length, 1), np.float32)}
    memory['next'] = np.zeros(3, np.int32)
    memory, enqueue = jax.tree.map(jnp.asarray, memory), jax.jit(bituning.enqueue)
    number = 1.0
    for labels in batches:
        keys = np.arange(number, number + 5, dtype=np.float32)
        number += 5
        memory = enqueue(memory, keys[:, None], -keys[:, None], np.array(labels))
        for c in range(3):
            rings[c].extend([k for k, y in zip(keys, labels, strict=True) if y == c])
    for c, ring in enumerate(rings):
        held = np.asarray(memory['h'])[c].ravel()
        assert sorted(held[held > 0]) == sorted(ring)
        np.testing.assert_array_equal(memory['z'][c], -memory['h'][c])


@pytest.mark.parametrize('cyclic', [False, True])
def test_rifle_head_rate(cyclic):
    config = digits.get_config()
    config.method, config.steps = 'rifle', 18
    config.rifle.update(periods=3, cyclic=cyclic)
    config.optimizer.update(learning_rate=0.1, momentum=0.0, weight_decay=0.0, nesterov=False)
    config.optimizer.schedule = 'cosine'  # the authors' choice for the other layers
    tx = METHODS['rifle'].optimizer(config.rifle, config)
    params = {'conv1': jnp.zeros(1), 'fc': {'kernel': jnp.zeros(1)}}
    state = tx.init(params)
    for step in range(18):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        head, others = (
            torch_recipes.rifle_head_lr(step, 18, 0.1, 3, each) for each in (cyclic, False)
        )
        np.testing.assert_allclose(-updates['fc']['kernel'], head, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(-updates['conv1'], others, rtol=1e-4, atol=1e-8)


def test_rifle_adds_the_steps_left_over_to_the_last_period():
    schedule = rifle.cyclic_schedule(periods=3, steps=20, peak=2.0)  # 6, 6 and 8 steps
    rates = [float(schedule(step)) for step in range(20)]
    within = np.concatenate([np.arange(6) / 6, np.arange(6) / 6, np.arange(8) / 8])
    np.testing.assert_allclose(rates, 1 + np.cos(np.pi * within), rtol=1e-5)


@pytest.mark.parametrize('law', HEAD_INITS)
def test_rifle_draws_the_head_at_the_end_of_each_period_but_the_last(law):
    view = make_view('rifle')
    view.options.periods = 3
    view.config.steps, view.config.head_init = 18, law
    head = {'kernel': jnp.ones((D, K)), 'bias': jnp.ones(K)}
    changed = []
    for step in range(1, 19):
        params = {'conv1': jnp.ones(3), 'fc': head}
        state = TrainState(jnp.asarray(step), params, {}, {}, {})
        after = rifle.after_step(view, state).params
        np.testing.assert_array_equal(after['conv1'], 1)
        if not np.array_equal(after['fc']['kernel'], head['kernel']):
            changed.append(step)
            expected = draw_head(view.key, D, K, law)
            jax.tree.map(np.testing.assert_array_equal, after['fc'], expected)
    of_public_code = [s + 1 for s in range(18) if torch_recipes.rifle_reinitializes(s, 18, 3)]
    assert changed == of_public_code[:-1] == [6, 12]  # not after the last step


@pytest.mark.parametrize('law', HEAD_INITS)
def test_a_new_head(law):
    head = jax.tree.map(np.asarray, draw_head(jax.random.key(0), 400, 300, law))
    bound = torch_recipes.torch_linear_bound(400)
    linear = torch.nn.Linear(400, 300)
    if law == 'uniform':
        for found, theirs in ((head['kernel'], linear.weight), (head['bias'], linear.bias)):
            theirs = theirs.detach().numpy()
            assert np.abs(found).max() <= bound and np.abs(theirs).max() <= bound
            np.testing.assert_allclose(found.std(), theirs.std(), rtol=0.1)
            np.testing.assert_allclose(found.std(), bound / np.sqrt(3), rtol=0.1)
    else:
        np.testing.assert_allclose(head['kernel'].std(), 0.01 * (law == 'normal'), rtol=0.02)
        np.testing.assert_array_equal(head['bias'], 0)


def test_seqtrain_similarity_is_the_earth_movers():
    t, s = normal(3, 2), normal(5, 2, seed=1)
    counts = np.array([10, 20, 70])
    similarity = domain_similarity(t, counts, s)
    for i, source in enumerate(s):
        distance = scipy.stats.wasserstein_distance_nd([source], t, [1.0], counts / 100)
        np.testing.assert_allclose(similarity[i], np.exp(-0.01 * distance), rtol=1e-6)
    # With a single target class, it is the similarity of two classes.
    np.testing.assert_allclose(
        domain_similarity(t[:1], counts[:1], s), class_similarity(t[:1], s, 'emd')[0], rtol=1e-6
    )
