"""The penalties of L2-SP, DTNH, DELTA, FSP and BSS, against PyTorch, NumPy and SciPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.method_checks import CLOSE, LABELS, B, D, K, check, make_view, nchw, normal, outputs
from xmixup_jax.errors import DataError
from xmixup_jax.methods import (
    METHODS,
    bss,
    delta,
    dtnh,
    fsp,
)
from xmixup_jax.methods.base import Sizes, linear_classifier, with_linear_head


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
    combined = dtnh.combine_gradients(as_tree(g), as_tree(r))
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
    combined = dtnh.combine_gradients(as_tree(zero), as_tree(r))
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

    def network(params, batch_stats, images, hook=lambda x, stage: x):
        del params, batch_stats
        first = hook(images, 0)
        second = hook(jnp.tanh(first @ mix), 1)
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
        np.testing.assert_allclose(ours, scipy.special.softmax(rise), **CLOSE)


@pytest.mark.parametrize('num_classes', [2, 4])
def test_linear_classifier(num_classes):
    labels = np.arange(40) % num_classes
    features = normal(40, D) + 3 * np.eye(D, dtype=np.float32)[labels]
    kernel, bias = linear_classifier(features, labels)
    assert kernel.shape == (D, num_classes) and bias.shape == (num_classes,)
    assert np.mean((features @ kernel + bias).argmax(1) == labels) > 0.9


def test_a_warm_head_needs_an_image_of_each_class():
    setup = SimpleNamespace(
        sizes=Sizes(3),
        state=None,
        target=SimpleNamespace(class_names=['cat', 'dog', 'emu']),
        outputs=lambda state, records: {'features': normal(4, D), 'label': np.array([0, 0, 2, 2])},
    )
    with pytest.raises(DataError, match=r'warm_head=True.* dog has none'):
        with_linear_head(setup)


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
    grad = jax.grad(bss.batch_spectral_shrinkage)(matrix, 2)
    assert np.isfinite(grad).all()
    if matrix.trace() == 4 and matrix.sum() == 4:
        # Any two of the four equal directions: the gradient is 2 u v^T summed over them.
        np.testing.assert_allclose(np.linalg.norm(grad), 2 * np.sqrt(2), rtol=1e-5)
