from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from xmixup_jax.models.base import conv
from xmixup_jax.models.cpu import matrix_product


@pytest.mark.parametrize('side', [1, 2, 3, 5])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('kernel', 'padding'), [((3, 3), ((1, 1), (1, 1))), ((1, 3), 'SAME'), ((5, 3), 'SAME')]
)
def test_matrix_product_is_the_convolution(side, stride, kernel, padding):
    rng = np.random.default_rng(0)
    x, k, g = (
        rng.normal(size=size).astype(np.float32)
        for size in ((4, side, side, 6), (*kernel, 6, 8), (4, side, side, 8))
    )
    usual = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    expected, pull = jax.vjp(usual, x, k)
    product = partial(
        matrix_product, strides=(stride, stride), padding=padding, shape=expected.shape
    )
    ours, our_pull = jax.vjp(product, x, k)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(ours, expected)
    g = g[:, : expected.shape[1], : expected.shape[2]]
    jax.tree.map(close, our_pull(g), pull(g))


@pytest.mark.parametrize(('side', 'products'), [(2, 1), (8, 0)])
def test_only_small_maps_take_it(side, products):
    layer = conv(3, 4, 3, 1, nnx.Rngs(0))
    lowered = jax.jit(lambda x: layer(x)).lower(np.zeros((2, side, side, 3), np.float32))
    assert lowered.as_text().count('stablehlo.dot_general') == products
