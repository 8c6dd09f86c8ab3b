"""L2-SP, DTNH, DELTA, FSP, BSS, MARS and MMD compared with their public code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import torch_recipes
from tests.method_checks import CLOSE, LABELS, B, D, K, check, make_view, nchw, normal, outputs
from xmixup_jax.compute.state import TrainState
from xmixup_jax.errors import DataError
from xmixup_jax.methods import (
    METHODS,
    bss,
    delta,
    dtnh,
    fsp,
    mars,
    mmd,
)
from xmixup_jax.methods.parts import linear_classifier


@pytest.mark.parametrize('name', ['l2sp', 'dtnh'])
@pytest.mark.parametrize('everything', [False, True])
def test_l2sp_penalty(name, everything):
    places = {
        'conv1.weight': ('conv1', 'kernel'),
        'bn1.weight': ('bn1', 'scale'),
        'bn1.bias': ('bn1', 'bias'),
        'fc.weight': ('fc', 'kernel'),
        'fc.bias': ('fc', 'bias'),
    }
    shapes = [(3, 2), (2,), (2,), (2, 4), (4,)]
    start = {key: normal(*shape, seed=1) for key, shape in zip(places, shapes, strict=True)}

    def tree(leaves):
        nested = {}
        for (layer, leaf), value in zip(places.values(), leaves, strict=True):
            nested.setdefault(layer, {})[leaf] = value
        return nested

    def ours(*leaves):
        constants = {'params': tree(start.values())}
        view = make_view(name, params=tree(leaves), constants=constants)
        view.options.update(alpha=0.3, beta=0.2, all_parameters=everything)
        return METHODS[name].penalty(view)

    def theirs(*leaves):
        tensors = {key: torch.tensor(value) for key, value in start.items()}
        params = dict(zip(places, leaves, strict=True))
        penalty = torch_recipes.l2sp_penalty(params, tensors, 0.3, 0.2, everything)
        return penalty + 0 * sum(leaf.sum() for leaf in leaves)  # a gradient for each

    check(ours, theirs, *[normal(*shape) for shape in shapes])


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
    # The rest of the penalty's gradient does not oppose the cross-entropy.
    assert (combined - g) @ g >= -1e-5 * scale**2


def test_dtnh_of_a_zero_gradient_is_the_penaltys():
    zero, r = np.zeros(5, np.float32), normal(5)
    combined = dtnh.combine_gradients(as_tree(zero), as_tree(r))
    np.testing.assert_array_equal(np.concatenate([combined['a'], combined['b']['c']]), r)


def test_delta_penalty():
    channels = {f'stage{i}': scipy.special.softmax(normal(c)) for i, c in enumerate((3, 5))}
    maps = normal(B, 4, 4, 3), normal(B, 2, 2, 5)
    reference = [normal(*m.shape, seed=1) for m in maps]
    head = normal(2, 2), normal(2)

    def ours(first, second, kernel, bias):
        view = make_view(
            'delta',
            outputs=outputs(convs=(first, second)),
            taught=[jnp.asarray(r) for r in reference],
            constants={'channels': channels},
            params={'fc': {'kernel': kernel, 'bias': bias}},
        )
        view.config.batch_size = B
        view.options.update(alpha=0.1, beta=0.2)
        return delta.penalty(view)

    def theirs(first, second, kernel, bias):
        fixed = [nchw(torch.tensor(r)) for r in reference]
        weights = [torch.tensor(a) for a in channels.values()]
        distance = torch_recipes.delta_penalty([nchw(first), nchw(second)], fixed, weights)
        return 0.1 * distance + 0.2 * torch_recipes.delta_head_penalty(kernel, bias)

    check(ours, theirs, *maps, *head)


def test_delta_attention():
    rises = 1e-3 * normal(50)
    weights = delta.attention(rises)
    np.testing.assert_allclose(weights, torch_recipes.delta_attention(torch.tensor(rises)), **CLOSE)
    # Without standardisation, such small rises would give every channel the same weight.
    assert 50 * weights.max() > 1.4 and 50 * weights.min() < 0.7
    np.testing.assert_allclose(delta.attention(np.zeros(4)), 0.25)


class TwoConvolutions(torch.nn.Module):
    """Two stages of a convolution, an affine map in the place of batch norm, and tanh."""

    def __init__(self, classifier):
        super().__init__()
        self.first = torch.nn.Conv2d(2, 3, 1, bias=False)
        self.second = torch.nn.Conv2d(3, 5, 1, bias=False)
        self.classifier = classifier

    def forward(self, images):
        x = torch.tanh(self.first(nchw(images)) + 0.5)
        x = torch.tanh(self.second(x) + 0.5)
        return self.classifier(x.mean((2, 3)))


def test_delta_channel_weights_by_zeroing_each_filter():
    images = normal(B, 3, 3, 2)
    torch.manual_seed(0)
    network = TwoConvolutions(torch.nn.Linear(5, K))
    first, second = (
        conv.weight.detach().numpy()[:, :, 0, 0].T for conv in (network.first, network.second)
    )

    def ours(params, batch_stats, images, hook=lambda x, stage, place: x):
        del params, batch_stats
        convs, x = [], images
        for stage, kernel in enumerate((first, second)):
            convs.append(hook(x @ kernel, stage, 'conv'))
            x = hook(jnp.tanh(convs[-1] + 0.5), stage, 'end')
        return outputs(features=x.mean((1, 2)), convs=convs)

    head = network.classifier
    classifier = head.weight.detach().numpy().T, head.bias.detach().numpy()
    weights = delta.channel_weights(ours, {}, {}, images, LABELS, classifier)
    batch = torch.tensor(images), torch.tensor(LABELS).long()
    for found, conv in zip(weights, (network.first, network.second), strict=True):
        rises = torch_recipes.delta_rises(network, conv, [batch])
        np.testing.assert_allclose(found, torch_recipes.delta_attention(rises), rtol=1e-3)


@pytest.mark.parametrize('num_classes', [2, 4])
def test_linear_classifier(num_classes):
    labels = np.arange(40) % num_classes
    features = normal(40, D) + 3 * np.eye(D, dtype=np.float32)[labels]
    kernel, bias = linear_classifier(features, labels, range(num_classes))
    assert kernel.shape == (D, num_classes) and bias.shape == (num_classes,)
    assert np.mean((features @ kernel + bias).argmax(1) == labels) > 0.9


def test_a_linear_classifier_needs_an_image_of_each_class():
    with pytest.raises(DataError, match=r"'dog' of the target .*warm_head=True"):
        linear_classifier(normal(4, D), np.array([0, 0, 2, 2]), ['cat', 'dog', 'emu'])


@pytest.mark.parametrize(('size', 'half'), [(4, 2), (5, 3), (7, 3)])
def test_fsp_penalty(size, half):
    maps = normal(B, size, size, 3), normal(B, half, half, 5), normal(B, half, half, 2)
    reference = [normal(*m.shape, seed=1) for m in maps]

    def ours(*maps):
        view = make_view(
            'fsp', outputs=outputs(stages=maps), taught=tuple(map(jnp.asarray, reference))
        )
        return fsp.penalty(view)

    def theirs(*maps):
        fixed = [nchw(torch.tensor(r)) for r in reference]
        return 50 * torch_recipes.fsp_loss([nchw(x) for x in maps], fixed)

    check(ours, theirs, *maps)


@pytest.mark.parametrize(('rows', 'k'), [(B, 1), (B, 3), (12, 2)])
def test_bss_penalty(rows, k):
    def ours(features):
        view = make_view('bss', outputs=outputs(features=features))
        view.options.update(eta=0.5, k=k)
        return bss.penalty(view)

    check(ours, lambda f: 0.5 * torch_recipes.bss_penalty(f, k), normal(rows, D))


@pytest.mark.parametrize('matrix', [np.eye(4, 6), np.ones((4, 6)), np.zeros((4, 6))])
def test_bss_gradient_is_finite_where_singular_values_coincide(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    grad = jax.grad(bss.batch_spectral_shrinkage)(matrix, 2)
    assert np.isfinite(grad).all()
    if matrix.trace() == 4 and matrix.sum() == 4:
        # All directions are equal; the gradient is the sum of 2 u v^T over any two of them.
        np.testing.assert_allclose(np.linalg.norm(grad), 2 * np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize(('rows', 'size'), [(B, 3), (7, 3), (64, 1)])
def test_mmd_penalty(rows, size):
    """The penalty compares the halves of a batch; an odd last image is left out."""

    def ours(features):
        return mmd.penalty(make_view('mmd', outputs=outputs(features=features)))

    def theirs(features):
        halves = torch_recipes.mmd_halves(features[:, :, None, None])
        return 0.1 * torch_recipes.mmd_loss(*halves)

    check(ours, theirs, normal(rows, size))


def test_mmd_of_equal_features_is_finite():
    value, grad = jax.value_and_grad(mmd.maximum_mean_discrepancy)(jnp.ones((6, 3)))
    assert value == 0 and np.isfinite(grad).all()


def network_of_layers(seed):
    """A convolution, a depthwise one, batch norm, a head."""
    return {
        'conv1': {'kernel': normal(3, 3, 2, 4, seed=seed)},
        'conv_dw': {'kernel': normal(3, 3, 1, 4, seed=seed)},
        'bn1': {'scale': normal(4, seed=seed), 'bias': normal(4, seed=seed)},
        'fc': {'kernel': normal(4, K, seed=seed), 'bias': normal(K, seed=seed)},
    }


def test_mars_projects_every_layer_after_a_step():
    start, params = network_of_layers(1), network_of_layers(2)
    variances = {
        seed: {'bn1': {'mean': normal(4), 'var': np.abs(normal(4, seed=seed))}} for seed in (1, 2)
    }
    view = make_view('mars', constants={'params': start, 'batch_stats': variances[1]})
    view.options.update(distance=9.0, head_distance=2.0)
    state = TrainState(jnp.asarray(1), params, variances[2], {}, {})
    found = mars.after_step(view, state).params

    def oihw(kernel):
        return torch.tensor(kernel).permute(3, 2, 0, 1)

    for name in ('conv1', 'conv_dw'):
        kernels = [oihw(tree[name]['kernel']) for tree in (params, start)]
        expected = torch_recipes.mars_project(*kernels, 9.0)
        np.testing.assert_allclose(oihw(np.array(found[name]['kernel'])), expected, **CLOSE)
        assert not torch.allclose(expected, kernels[0])
    head = torch_recipes.mars_project(torch.tensor(params['fc']['kernel']).T, None, 2.0)
    np.testing.assert_allclose(found['fc']['kernel'], head.T, **CLOSE)
    both = [
        torch.tensor(value)
        for seed, tree in ((2, params), (1, start))
        for value in (tree['bn1']['scale'], variances[seed]['bn1']['var'])
    ]
    for distance in (9.0, 0.5):  # the scales are within the first, not within the second
        view.options.distance = distance
        scale = mars.after_step(view, state).params['bn1']['scale']
        expected = torch_recipes.mars_project_batch_norm(*both, distance)
        np.testing.assert_allclose(scale, expected, **CLOSE)
    for name in ('bn1', 'fc'):
        np.testing.assert_array_equal(found[name]['bias'], params[name]['bias'])


def test_mars_leaves_scales_within_the_distance_to_the_last_digit():
    scale, var = np.abs(normal(2, 500)), np.abs(normal(2, 500, seed=1))
    found = mars.project_scale(scale[0], scale[0], var[0], var[0], 1e-3)
    np.testing.assert_array_equal(found, scale[0])
    moved = scale[0] * 1.01
    np.testing.assert_array_equal(mars.project_scale(moved, scale[0], var[0], var[0], 1e3), moved)


@given(st.integers(0, 100), st.floats(0.5, 50, width=32))
def test_mars_never_exceeds_the_distance_and_leaves_what_is_within(seed, distance):
    start, kernel = normal(3, 3, 2, 4, seed=1), 2 * normal(3, 3, 2, 4, seed=seed)
    found = np.asarray(mars.mars_projection(kernel, start, distance))
    norms = [np.abs(x - start).sum(axis=(0, 1, 2)) for x in (kernel, found)]
    assert (norms[1] <= distance * (1 + 1e-5)).all()
    within = norms[0] <= distance * (1 - 1e-5)
    np.testing.assert_allclose(found[..., within], kernel[..., within], rtol=1e-5, atol=1e-6)
