"""Compares convolutions with small outputs on this machine, by XLA and as matrix products:

    python -m benchmarks.small_maps

Prints milliseconds of the forward pass, and of the gradients by input and kernel.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.synthetic import seconds_of
from xmixup_jax.models.cpu import matrix_product

# Side of the input, channels, filters, kernel, stride; batch 32.
SHAPES = (
    (1, 512, 512, 3, 1),
    (2, 128, 128, 3, 1),
    (2, 512, 512, 3, 1),
    (3, 512, 512, 3, 1),
    (3, 512, 512, 3, 2),
    (4, 256, 512, 3, 2),
    (4, 512, 512, 3, 1),
    (5, 128, 128, 3, 2),
    (7, 512, 512, 3, 2),
    (7, 512, 512, 3, 1),
)


def main() -> None:
    rng = np.random.default_rng(0)
    print(f'{jax.devices()[0].device_kind}: forward XLA, product, ratio | gradients')
    for side, channels, filters, kernel, stride in SHAPES:
        x = jnp.asarray(rng.normal(size=(32, side, side, channels)), jnp.float32)
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
        cells = []
        for derive in (False, True):
            times = []
            for conv in (usual, product):
                f = jax.grad(lambda x, k, conv=conv: conv(x, k).sum(), (0, 1)) if derive else conv
                times.append(1e3 * seconds_of(jax.jit(f), x, k))
            cells.append(f'{times[0]:7.1f} {times[1]:7.1f} {times[0] / times[1]:6.1f}')
        print(f'{side:3} {channels:4} {filters:4} {kernel} {stride} |', ' | '.join(cells))


if __name__ == '__main__':
    main()
