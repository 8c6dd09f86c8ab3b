"""Fine-tuning and the methods with heads, layers, queues or phases of their own."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from tests.method_checks import (
    CLOSE,
    K_0,
    LABELS,
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
from xmixup_jax.matching import class_similarity, domain_similarity
from xmixup_jax.methods import (
    METHODS,
    bituning,
    cotuning,
    lwf,
    rifle,
)
from xmixup_jax.methods.stochnorm import StochNorm
from xmixup_jax.step import TrainState


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
        view.config.lwf.weight, view.config.lwf.temperature = 0.6, 3.0
        return lwf.loss(view)

    def theirs(logits):
        soft = F.softmax(torch.tensor(teacher) / 3, dim=1)
        kept = -(soft * F.log_softmax(logits[:, K:] / 3, dim=1)).sum(1).mean()
        return F.cross_entropy(logits[:, :K], LABELS_T) + 0.6 * kept

    check(ours, theirs, normal(B, K + K_0))


def test_stochnorm():
    key, p = jax.random.key(5), 0.5
    layer = StochNorm(D, p=p, momentum=0.9, epsilon=1e-5, axis_name='batch', rngs=nnx.Rngs(0))
    mean, var = normal(D), np.abs(normal(D, seed=1)) + 0.5
    layer.mean[...], layer.var[...] = mean, var
    layer.key = key
    chosen = torch.tensor(np.asarray(jax.random.bernoulli(key, p, (D,))))
    assert chosen.any() and not chosen.all()
    weights = normal(B, 3, 3, D, seed=2)
    running = []

    def ours(x):
        copy = nnx.clone(layer)
        copy.key = key
        y = copy(x)
        return jnp.sum(y * weights)

    def theirs(x):
        moving_mean, moving_var = torch.tensor(mean), torch.tensor(var)
        by_moving = F.batch_norm(nchw(x), torch.tensor(mean), torch.tensor(var), training=False)
        by_batch = F.batch_norm(nchw(x), moving_mean, moving_var, training=True, momentum=0.1)
        running.extend([moving_mean, moving_var])
        y = torch.where(chosen[:, None, None], by_batch, by_moving)
        return (y * nchw(torch.tensor(weights))).sum()

    x = normal(B, 3, 3, D)
    check(ours, theirs, x)

    def statistics(x):
        copy = nnx.clone(layer)
        copy.key = key
        copy(x)
        return copy.mean[...], copy.var[...]

    stats = on_batch_axis(statistics)(x)
    np.testing.assert_allclose(stats[0], running[0].numpy(), **CLOSE)
    # PyTorch's moving variance is the unbiased one.
    count = x.size / D
    biased = var * 0.9 + (running[1].numpy() - var * 0.9) * (count - 1) / count
    np.testing.assert_allclose(stats[1], biased, **CLOSE)


def test_stochnorm_evaluates_like_batch_norm():
    layer = StochNorm(D, p=0.5, epsilon=1e-5, rngs=nnx.Rngs(0))
    layer.eval()
    x = normal(B, D)
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), **CLOSE)


def test_cotuning_relationship_and_loss():
    logits, labels = normal(12, K_0), np.arange(12) % K
    table = cotuning.relationship(logits, labels, K, temperature=1.5)
    for c in range(K):
        expected = F.softmax(torch.tensor(logits[labels == c]) / 1.5, dim=1).mean(0)
        np.testing.assert_allclose(table[c], expected, **CLOSE)
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-6)

    def ours(z):
        view = make_view('cotuning', outputs=outputs(z), constants={'relationship': table})
        return cotuning.loss(view)

    def theirs(z):
        soft = torch.tensor(table)[LABELS_T]
        source = -(soft * F.log_softmax(z[:, K:], dim=1)).sum(1).mean()
        return F.cross_entropy(z[:, :K], LABELS_T) + 2.3 * source

    check(ours, theirs, normal(B, K + K_0))


def test_cotuning_finds_the_temperature_that_made_the_labels():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20000, K_0)) * 2
    labels = (true + rng.gumbel(size=true.shape)).argmax(1)  # drawn from softmax(true)
    np.testing.assert_allclose(cotuning.fit_temperature(true * 2.5, labels), 2.5, rtol=0.05)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_bituning():
    config = digits.get_config().bituning
    queue, dim = 3, 7
    memory = {'h': normal(K, queue, D + 1), 'z': normal(K, queue, dim)}
    memory = {k: v / np.linalg.norm(v, axis=-1, keepdims=True) for k, v in memory.items()}
    key_z = normal(B, dim, seed=1)
    key_z /= np.linalg.norm(key_z, axis=1, keepdims=True)
    kernel, bias = normal(D, K + dim), normal(K + dim)

    def ours(features, logits):
        view = make_view(
            'bituning',
            outputs=outputs(logits, features),
            taught={'z': jnp.asarray(key_z)},
            memory=memory,
            params={'fc': {'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}},
        )
        return bituning.loss(view)

    def theirs(features, logits):
        total = F.cross_entropy(logits[:, :K], LABELS_T)
        z = unit(logits[:, K:])
        h = unit(torch.cat([features, torch.ones(B, 1)], dim=1))
        w = unit(torch.cat([torch.tensor(kernel), torch.tensor(bias)[None]]).T[:K])
        for i, y in enumerate(LABELS):
            for current, keys, query in (
                (z[i] @ torch.tensor(key_z[i]), memory['z'], z[i]),
                (w[y] @ h[i], memory['h'], w[y]),
            ):
                scores = [current] + [query @ torch.tensor(k) for k in keys.reshape(K * queue, -1)]
                log_p = F.log_softmax(torch.stack(scores) / config.temperature, dim=0)
                own = [0] + [1 + y * queue + j for j in range(queue)]
                total = total - log_p[own].mean() / B
        return total

    check(ours, theirs, normal(B, D), normal(B, K + dim))


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
        for c in range(3):  # of more keys than places, the first ones count
            rings[c].extend([k for k, y in zip(keys, labels, strict=True) if y == c][:length])
    for c, ring in enumerate(rings):
        held = np.asarray(memory['h'])[c].ravel()
        assert sorted(held[held > 0]) == sorted(ring)
        np.testing.assert_array_equal(memory['z'][c], -memory['h'][c])


def test_rifle_schedule_and_periods():
    config = digits.get_config()
    config.steps, config.rifle.periods = 20, 3  # periods of 6, 6 and 8 steps
    config.optimizer.learning_rate, config.optimizer.head_multiplier = 0.1, 2.0
    rates = [float(rifle.head_schedule(config)(step)) for step in range(20)]
    within = np.concatenate([np.arange(6) / 6, np.arange(6) / 6, np.arange(8) / 8])
    np.testing.assert_allclose(rates, 0.1 * (1 + np.cos(np.pi * within)), rtol=1e-5)


def test_rifle_draws_the_head_at_the_end_of_each_period_but_the_last():
    view = make_view('rifle')
    view.config.steps, view.config.rifle.periods = 18, 3
    head = {'kernel': jnp.ones((D, K)), 'bias': jnp.ones(K)}
    changed = []
    for step in range(1, 19):
        params = {'conv1': jnp.ones(3), 'fc': head}
        state = TrainState(jnp.asarray(step), params, {}, {}, {})
        after = rifle.after_step(view, state).params
        np.testing.assert_array_equal(after['conv1'], 1)
        if not np.array_equal(after['fc']['kernel'], head['kernel']):
            changed.append(step)
            assert np.abs(after['fc']['kernel']).max() < 3 / np.sqrt(D)
            np.testing.assert_array_equal(after['fc']['bias'], 0)
    assert changed == [6, 12]


def test_seqtrain_similarity_is_the_earth_movers():
    t, s = normal(3, 2), normal(5, 2, seed=1)
    counts = np.array([10, 20, 70])
    similarity = domain_similarity(t, counts, s)
    for i, source in enumerate(s):
        distance = scipy.stats.wasserstein_distance_nd([source], t, [1.0], counts / 100)
        np.testing.assert_allclose(similarity[i], np.exp(-0.01 * distance), rtol=1e-6)
    # With a single target class it is the similarity of two classes.
    np.testing.assert_allclose(
        domain_similarity(t[:1], counts[:1], s), class_similarity(t[:1], s, 'emd')[0], rtol=1e-6
    )


def test_every_published_coefficient_is_in_the_configuration():
    config = digits.get_config()
    for name, method in METHODS.items():
        assert (name in config) == bool(method.defaults)
        if method.defaults:
            assert config[name].to_dict() == method.defaults
