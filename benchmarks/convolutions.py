"""Compares convolutions on this machine, by XLA and as matrix products:

    python -m benchmarks.convolutions
    XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+individual_convolution \\
        python -m benchmarks.convolutions

Prints milliseconds of the forward pass, and of the gradients by input and kernel; then, for max
pooling, of both passes, by XLA and as the program has it. Batch 32. The first command has the
settings that the program chooses for a CPU (`program.use_eigen`), the second those of XLA.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.synthetic import seconds_of
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.models.cpu import matrix_product
from xmixup_jax.models.pooling import max_pool, usual_max_pool

# Side of the input, channels, filters, kernel, stride.
SHAPES = (
    (1, 512, 512, 3, 1),
    (2, 512, 512, 3, 1),
    (3, 512, 512, 3, 1),
    (3, 512, 512, 3, 2),
    (4, 256, 512, 3, 2),
    (4, 512, 512, 3, 1),
    (7, 512, 512, 3, 1),
    (8, 128, 128, 3, 1),
    (16, 64, 64, 3, 1),
    (28, 64, 64, 3, 1),
    (14, 96, 576, 1, 1),
    (14, 576, 96, 1, 1),
    (28, 512, 128, 1, 1),
    (28, 256, 512, 1, 2),
    (56, 16, 96, 1, 1),
    (56, 64, 256, 1, 1),
)
BATCH = 32


def run(argv: list[str]) -> None:
    rng = np.random.default_rng(0)
    print(f'{jax.devices()[0].device_kind}: forward XLA, product, ratio | gradients')
    for side, channels, filters, kernel, stride in SHAPES:
        x = jnp.asarray(rng.normal(size=(BATCH, side, side, channels)), jnp.float32)
        k = jnp.asarray(rng.normal(size=(kernel, kernel, channels, filters)), jnp.float32)
        pads = ((kernel // 2, kernel // 2),) * 2
        usual = partial(
            jax.lax.conv_general_dilated,
            window_strides=(stride, stride),
            padding=pads,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        shape = jax.eval_shape(usual, x, k).shape
        product = partial(matrix_product, strides=(stride, stride), padding=pads, shape=shape)
        grad = jnp.asarray(rng.normal(size=shape), jnp.float32)
        cells = []
        for call in (_forward, _gradients):
            times = [
                1e3 * seconds_of(jax.jit(partial(call, conv)), x, k, grad)
                for conv in (usual, product)
            ]
            cells.append(f'{times[0]:7.1f} {times[1]:7.1f} {times[0] / times[1]:6.1f}')
        print(f'{side:3} {channels:4} {filters:4} {kernel} {stride} |', ' | '.join(cells))
    for side in (32, 112):
        x = jnp.asarray(rng.normal(size=(BATCH, side, side, 64)), jnp.float32)
        times = [
            1e3 * seconds_of(jax.jit(partial(_pooled, pool)), x)
            for pool in (usual_max_pool, max_pool)
        ]
        ratio = times[0] / times[1]
        print(f'{side:3}   64 max pooling | {times[0]:7.1f} {times[1]:7.1f} {ratio:6.1f}')


def _pooled(pool, x):
    y, back = jax.vjp(lambda x: pool(x, 3, 2, 1), x)
    return y, back(y)


def _forward(conv, x, k, grad):
    return conv(x, k)


def _gradients(conv, x, k, grad):
    return jax.vjp(conv, x, k)[1](grad)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
