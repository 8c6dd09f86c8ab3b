import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from xmixup_jax.models.base import conv
from xmixup_jax.models.cpu import DepthwiseConv, any_platform, matrix_product


@pytest.mark.parametrize('side', [1, 2, 3, 5])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('kernel', 'padding'),
    [((3, 3), ((1, 1), (1, 1))), ((1, 3), 'SAME'), ((5, 3), 'SAME'), ((1, 1), ((0, 0), (0, 0)))],
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


@pytest.mark.parametrize(('side', 'kernel', 'products'), [(2, 3, 1), (8, 3, 0), (8, 1, 1)])
def test_small_maps_and_pointwise_kernels_take_it(side, kernel, products):
    layer = conv(3, 4, kernel, 1, nnx.Rngs(0))
    lowered = jax.jit(lambda x: layer(x)).lower(np.zeros((2, side, side, 3), np.float32))
    assert lowered.as_text().count('stablehlo.dot_general') == products


@pytest.mark.parametrize('exported', [False, True])
def test_the_usual_forms_are_kept_for_an_export(exported):
    """The program for a CPU has no grouped convolution, and one for every platform has it."""
    layer = DepthwiseConv(6, 3, 1, nnx.Rngs(0))
    with any_platform() if exported else nullcontext():
        program = jax.export.export(jax.jit(lambda x: layer(x)), platforms=('cpu', 'cuda'))(
            np.zeros((2, 8, 8, 6), np.float32)
        )
    assert ('feature_group_count = 6' in program.mlir_module()) == exported


CONVOLVE = """
import jax, numpy as np
from xmixup_jax.cli.program import use_eigen
use_eigen()
f = jax.jit(lambda x, k: jax.lax.conv(x, k, (1, 1), 'SAME'))
compiled = f.lower(np.ones((8, 64, 16, 16), 'f'), np.ones((64, 64, 3, 3), 'f')).compile()
print(compiled.as_text().count('__ynn_fusion'))
"""


@pytest.mark.parametrize(
    ('flags', 'chosen'),
    [('', True), ('--xla_cpu_experimental_ynn_fusion_type=+individual_convolution', False)],
)
def test_eigen_computes_convolutions_unless_the_user_chooses(flags, chosen):
    """The number of convolutions that XLA leaves to YNNPACK."""
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    ran = subprocess.run(
        [sys.executable, '-c', CONVOLVE], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert (int(ran.stdout) == 0) == chosen
