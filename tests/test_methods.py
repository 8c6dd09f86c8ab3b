"""Every method's mathematics, values and gradients, against PyTorch, NumPy or SciPy."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from xmixup_jax import mixing
from xmixup_jax.matching import class_similarity, domain_similarity
from xmixup_jax.methods import (
    METHODS,
    bituning,
    bss,
    cotuning,
    cutmix,
    delta,
    dtnh,
    fsp,
    lwf,
    rifle,
    smile,
)
from xmixup_jax.methods.base import View
from xmixup_jax.methods.stochnorm import StochNorm
from xmixup_jax.models import Outputs

B, K, K_0, D = 6, 4, 5, 8
RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 2, 3, 1, 1], np.int32)
close = {'rtol': 1e-5, 'atol': 1e-5}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def make_view(name, **parts):
    config = digits.get_config()
    config.method = name
    parts.setdefault('batch', {'label': jnp.asarray(LABELS)})
    empty = dict.fromkeys(View._fields)
    return View(**(empty | {'config': config, 'num_classes': K, 'key': jax.random.key(0)} | parts))


def outputs(logits=None, features=None, stages=()):
    return Outputs(logits, features, tuple(stages))


def on_batch_axis(function):
    """Calls `function` as the step does on one device, under the mapped axis 'batch'."""

    def call(*args):
        one = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
        return jax.tree.map(lambda x: x[0], jax.vmap(function, axis_name='batch')(*one))

    return call


def check(ours, theirs, *arrays):
    """Value and gradients of ours(*arrays), JAX, and theirs(*tensors), PyTorch."""
    value, grads = jax.value_and_grad(on_batch_axis(ours), argnums=tuple(range(len(arrays))))(
        *[jnp.asarray(array) for array in arrays]
    )
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), **close)
    for grad, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), **close)


def nchw(x):
    return x.permute(0, 3, 1, 2)


LABELS_T = torch.tensor(LABELS, dtype=torch.long)


def test_finetune():
    check(
        lambda z: METHODS['finetune'].loss(make_view('finetune', outputs=outputs(z))),
        lambda z: F.cross_entropy(z, LABELS_T),
        normal(B, K),
    )


@pytest.mark.parametrize('name', ['l2sp', 'dtnh'])
def test_l2sp_penalty(name):
    start = {'conv1': {'kernel': normal(3, 2, seed=1)}, 'fc': {'kernel': normal(2, 2, seed=2)}}

    def ours(backbone, head):
        params = {'conv1': {'kernel': backbone}, 'fc': {'kernel': head}}
        view = make_view(name, params=params, constants={'params': start})
        view.config[name].alpha, view.config[name].beta = 0.3, 0.2
        return METHODS[name].penalty(view)

    def theirs(backbone, head):
        distance = backbone - torch.tensor(start['conv1']['kernel'])
        return 0.15 * distance.square().sum() + 0.1 * head.square().sum()

    check(ours, theirs, normal(3, 2), normal(2, 2))


def vectors():
    values = st.floats(-10, 10, allow_nan=False, width=32)
    return st.lists(values, min_size=5, max_size=5).map(lambda v: np.array(v, np.float32))


def as_tree(vector):
    return {'a': jnp.asarray(vector[:2]), 'b': {'c': jnp.asarray(vector[2:])}}


@given(vectors(), vectors())
def test_dtnh_never_opposes_the_cross_entropy(g, r):
    combined = dtnh.combine(as_tree(g), as_tree(r))
    combined = np.concatenate([combined['a'], combined['b']['c']]).astype(np.float64)
    g, r = g.astype(np.float64), r.astype(np.float64)
    square = g @ g
    expected = g + r if r @ g >= 0 or not square else g + r - (r @ g) / square * g
    scale = 1 + np.abs(g).max() + np.abs(r).max()
    np.testing.assert_allclose(combined, expected, atol=2e-5 * scale, rtol=1e-5)
    assert combined @ g >= -1e-5 * scale**2
    # The part that is left of the penalty does not work against the cross-entropy either.
    assert (combined - g) @ g >= -1e-5 * scale**2


def test_dtnh_of_a_zero_gradient_is_the_penaltys():
    zero, r = np.zeros(5, np.float32), normal(5)
    combined = dtnh.combine(as_tree(zero), as_tree(r))
    np.testing.assert_array_equal(np.concatenate([combined['a'], combined['b']['c']]), r)


def test_delta_penalty():
    channels = {f'stage{i}': scipy.special.softmax(normal(c)) for i, c in enumerate((3, 5))}
    maps = normal(B, 4, 4, 3), normal(B, 2, 2, 5)
    reference = [normal(*m.shape, seed=1) for m in maps]
    head = normal(2, 2)

    def ours(first, second, head):
        view = make_view(
            'delta',
            outputs=outputs(stages=(first, second)),
            taught=[jnp.asarray(r) for r in reference],
            constants={'channels': channels},
            params={'fc': {'kernel': head}},
        )
        view.config.batch_size = B
        view.config.delta.alpha, view.config.delta.beta = 0.1, 0.2
        return delta.penalty(view)

    def theirs(first, second, head):
        total = 0.1 * head.square().sum()
        for ours, theirs, a in zip((first, second), reference, channels.values(), strict=True):
            b, h, w, c = ours.shape
            difference = nchw(ours) - nchw(torch.tensor(theirs))
            norms = torch.norm(difference.reshape(b, c, h * w), dim=2)
            total = total + 0.1 / 2 * (c / (h * w) * torch.tensor(a) * norms**2).sum()
        return total

    check(ours, theirs, *maps, head)


def test_delta_channel_weights_by_zeroing_each_channel():
    images, labels = normal(B, 3, 3, 2), LABELS
    kernel, bias = normal(5, K), normal(K)
    mix = normal(2, 5)

    def network(params, batch_stats, images, scales=None):
        del params, batch_stats
        scales = (1.0, 1.0) if scales is None else scales
        first = images * scales[0]
        second = jnp.tanh(first @ mix) * scales[1]
        return outputs(features=second.mean((1, 2)), stages=(first, second))

    weights = delta.channel_weights(network, {}, {}, images, labels, (kernel, bias))

    def loss(zero_first=None, zero_second=None):
        first = images.astype(np.float64).copy()
        if zero_first is not None:
            first[..., zero_first] = 0
        second = np.tanh(first @ mix)
        if zero_second is not None:
            second[..., zero_second] = 0
        log_p = scipy.special.log_softmax(second.mean((1, 2)) @ kernel + bias, axis=1)
        return -log_p[np.arange(B), labels].mean()

    rises = [
        [loss(zero_first=c) - loss() for c in range(2)],
        [loss(zero_second=c) - loss() for c in range(5)],
    ]
    for ours, rise in zip(weights, rises, strict=True):
        np.testing.assert_allclose(ours, scipy.special.softmax(rise), **close)


@pytest.mark.parametrize('num_classes', [2, 4])
def test_delta_linear_classifier(num_classes):
    labels = np.arange(40) % num_classes
    features = normal(40, D) + 3 * np.eye(D, dtype=np.float32)[labels]
    kernel, bias = delta.linear_classifier(features, labels)
    assert kernel.shape == (D, num_classes) and bias.shape == (num_classes,)
    assert np.mean((features @ kernel + bias).argmax(1) == labels) > 0.9


@pytest.mark.parametrize('size', [4, 5])
def test_fsp_penalty(size):
    half = -(-size // 2)
    maps = normal(B, size, size, 3), normal(B, half, half, 5), normal(B, half, half, 2)
    reference = [normal(*m.shape, seed=1) for m in maps]

    def ours(*maps):
        view = make_view(
            'fsp', outputs=outputs(stages=maps), taught=tuple(map(jnp.asarray, reference))
        )
        return fsp.penalty(view)

    def flow(before, after):
        before, after = nchw(before), nchw(after)
        if before.shape[-1] > after.shape[-1]:
            before = F.avg_pool2d(before, 2, ceil_mode=True, count_include_pad=False)
        return torch.bmm(before.flatten(2), after.flatten(2).transpose(1, 2)) / half**2

    def theirs(*maps):
        fixed = [torch.tensor(r) for r in reference]
        distances = [
            (flow(maps[i], maps[i + 1]) - flow(fixed[i], fixed[i + 1])).square().mean()
            for i in range(2)
        ]
        return 50 * sum(distances)

    check(ours, theirs, *maps)


@pytest.mark.parametrize(('rows', 'k'), [(B, 1), (B, 3), (12, 2)])
def test_bss_penalty(rows, k):
    def ours(features):
        view = make_view('bss', outputs=outputs(features=features))
        view.config.bss.eta, view.config.bss.k = 0.5, k
        return bss.penalty(view)

    check(ours, lambda f: 0.5 * torch.linalg.svdvals(f)[-k:].square().sum(), normal(rows, D))


@pytest.mark.parametrize('matrix', [np.eye(4, 6), np.ones((4, 6)), np.zeros((4, 6))])
def test_bss_gradient_is_finite_where_singular_values_coincide(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    grad = jax.grad(bss.smallest_squares)(matrix, 2)
    assert np.isfinite(grad).all()
    if matrix.trace() == 4 and matrix.sum() == 4:
        # Any two of the four equal directions: the gradient is 2 u v^T summed over them.
        np.testing.assert_allclose(np.linalg.norm(grad), 2 * np.sqrt(2), rtol=1e-5)


def test_cotrain():
    source_label = np.array([2, 0, 1, 1, 0, 2])

    def ours(logits):
        batch = {'label': jnp.asarray(LABELS), 'source_label': jnp.asarray(source_label)}
        view = make_view('cotrain', outputs=outputs(logits), batch=batch)
        view.config.cotrain.weight = 0.7
        return METHODS['cotrain'].loss(view)

    def theirs(logits):
        target, source = logits[:B, :K], logits[B:, K:]
        return F.cross_entropy(target, LABELS_T) + 0.7 * F.cross_entropy(
            source, torch.tensor(source_label)
        )

    check(ours, theirs, normal(2 * B, K + 3))


LAM = np.random.default_rng(1).random(B).astype(np.float32)
OTHER = np.roll(LABELS, 1)
MIXED = {'label': LABELS, 'other_label': OTHER, 'lam': LAM}


def mixed(logits):
    each = [
        F.cross_entropy(logits[:, :K], torch.tensor(y).long(), reduction='none')
        for y in (LABELS, OTHER)
    ]
    return (torch.tensor(LAM) * each[0] + (1 - torch.tensor(LAM)) * each[1]).mean()


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_loss_of_two_labels(name):
    batch = {key: jnp.asarray(value) for key, value in MIXED.items()}
    check(
        lambda z: METHODS[name].loss(make_view(name, outputs=outputs(z), batch=batch)),
        mixed,
        normal(B, K),
    )


def batch_of_images(size=10):
    return {'image': normal(B, size, size, 3), 'label': LABELS}


def transformed(name, **changes):
    config = digits.get_config()
    config[name].update(changes)
    keys = jax.random.split(jax.random.key(3), B)
    transform = on_batch_axis(lambda batch: METHODS[name].transform(config, keys, batch))
    batch = batch_of_images()
    return batch, jax.tree.map(np.asarray, transform(batch))


@pytest.mark.parametrize('name', ['mixup', 'smile'])
def test_mixup_meets_the_record_before(name):
    before, after = transformed(name, alpha=1.0)
    lam = after['lam'][:, None, None, None]
    partner = np.roll(before['image'], 1, axis=0)
    np.testing.assert_allclose(after['image'], lam * before['image'] + (1 - lam) * partner, **close)
    np.testing.assert_array_equal(after['other_label'], OTHER)
    assert len(np.unique(after['lam'])) == B


def test_cutmix_pastes_one_box_and_weights_by_its_area():
    before, after = transformed('cutmix', alpha=1.0)
    partner = np.roll(before['image'], 1, axis=0)
    pasted = (after['image'] == partner).all(-1)
    kept = (after['image'] == before['image']).all(-1)
    assert np.array_equal(pasted, ~kept) and pasted.any() and kept.any()
    np.testing.assert_allclose(after['lam'], 1 - pasted.mean((1, 2)), rtol=1e-6)
    for mask in pasted:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None])  # a rectangle
        assert (np.diff(np.flatnonzero(rows)) == 1).all() and (
            np.diff(np.flatnonzero(columns)) == 1
        ).all()


@given(st.integers(0, 1000), st.floats(0, 1, width=32), st.sampled_from((7, 32)))
def test_cutmix_box_area(seed, lam, size):
    """The side is size * sqrt(1 - lam), up to rounding and the border."""
    mask = jax.jit(cutmix.box_mask, static_argnums=2)(jax.random.key(seed), lam, size)
    area = float(mask.sum())
    side = size * np.sqrt(1 - lam)
    assert np.floor(side / 2 - 1).clip(0) ** 2 <= area <= (side + 1) ** 2


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
    np.testing.assert_allclose(stats[0], running[0].numpy(), **close)
    # PyTorch's moving variance is the unbiased one.
    count = x.size / D
    biased = var * 0.9 + (running[1].numpy() - var * 0.9) * (count - 1) / count
    np.testing.assert_allclose(stats[1], biased, **close)


def test_stochnorm_evaluates_like_batch_norm():
    layer = StochNorm(D, p=0.5, epsilon=1e-5, rngs=nnx.Rngs(0))
    layer.eval()
    x = normal(B, D)
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), **close)


def test_cotuning_relationship_and_loss():
    logits, labels = normal(12, K_0), np.arange(12) % K
    table = cotuning.relationship(logits, labels, K, temperature=1.5)
    for c in range(K):
        expected = F.softmax(torch.tensor(logits[labels == c]) / 1.5, dim=1).mean(0)
        np.testing.assert_allclose(table[c], expected, **close)
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
    from xmixup_jax.step import TrainState

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


def test_smile():
    maps, teacher_maps = normal(B, 2, 2, 3), normal(B, 2, 2, 3, seed=1)
    probabilities = scipy.special.softmax(normal(B, K_0), axis=1).astype(np.float32)
    lam = LAM[:, None]
    soft = lam * probabilities + (1 - lam) * np.roll(probabilities, 1, axis=0)
    batch = {key: jnp.asarray(value) for key, value in MIXED.items()}
    # What `teach` makes of a teacher with these outputs.
    logits = np.pad(np.log(probabilities), ((0, 0), (K, 0)))
    view = make_view(
        'smile',
        batch=batch | {'unmixed': None},
        network=lambda *_: outputs(logits, stages=(teacher_maps,)),
        memory={'params': None},
        constants={'batch_stats': None},
    )
    taught = jax.vmap(lambda _: smile.teach(view), axis_name='batch')(jnp.zeros(1))
    taught = jax.tree.map(lambda x: x[0], taught)
    np.testing.assert_allclose(taught['probabilities'], soft, **close)
    lam = LAM[:, None, None, None]
    target = lam * teacher_maps + (1 - lam) * np.roll(teacher_maps, 1, axis=0)
    np.testing.assert_allclose(taught['maps'], target, **close)

    def ours(z, maps):
        seen = make_view('smile', batch=batch, taught=taught, outputs=outputs(z, stages=(maps,)))
        seen.config.smile.feature_weight = 0.3
        return smile.loss(seen)

    def theirs(z, maps):
        source = -(torch.tensor(soft) * F.log_softmax(z[:, K:], dim=1)).sum(1).mean()
        distance = torch.norm(maps - torch.tensor(target)) / 4
        return mixed(z) + 0.3 * distance + 0.1 * source

    check(ours, theirs, normal(B, K + K_0), maps)


def test_smile_teacher_follows_the_backbone_and_keeps_its_head():
    from xmixup_jax.step import TrainState

    params = {'conv1': jnp.ones(2), 'fc': {'kernel': jnp.ones(2)}}
    teacher = {'params': jax.tree.map(jnp.zeros_like, params)}
    state = TrainState(jnp.asarray(1), params, {}, {}, teacher)
    memory = smile.after_step(make_view('smile'), state).memory['params']
    np.testing.assert_allclose(memory['conv1'], 0.001, rtol=1e-5)
    np.testing.assert_array_equal(memory['fc']['kernel'], 0)


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


def test_neighbour_goes_around_the_whole_batch():
    values = np.arange(12).reshape(4, 3)  # four devices with three records each
    rolled = jax.vmap(mixing.neighbour, axis_name='batch')(values)
    np.testing.assert_array_equal(np.ravel(rolled), np.roll(np.arange(12), 1))


def test_every_published_coefficient_is_in_the_configuration():
    config = digits.get_config()
    for name, method in METHODS.items():
        assert (name in config) == bool(method.defaults)
        if method.defaults:
            assert config[name].to_dict() == method.defaults
