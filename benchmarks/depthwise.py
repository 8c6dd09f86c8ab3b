"""Compares two implementations of depthwise convolutions on this machine's CPU:

    python -m benchmarks.depthwise

Times XLA's grouped convolution and the sum of shifts on EfficientNet-Lite0's layers at 224 px,
batch 16, float32. Prints milliseconds of the forward pass, and of the value with both gradients;
medians of 5.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from xmixup_jax.models.cpu import grouped_conv, sum_of_shifts

# Side of the feature map, channels, side of the kernel, stride.
LAYERS = (
    (112, 32, 3, 1),
    (112, 96, 3, 2),
    (56, 144, 5, 2),
    (28, 240, 5, 1),
    (14, 480, 3, 1),
    (14, 672, 5, 1),
    (7, 1152, 5, 1),
)
ROUNDS = 5


def milliseconds(function, *args) -> float:
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))


def loss(conv, stride, x, kernel):
    return jnp.square(conv(x, kernel, stride)).sum()


def main() -> None:
    rng = np.random.default_rng(0)
    print('side channels kernel stride | forward XLA, shifts, ratio | gradient XLA, shifts, ratio')
    for side, channels, kernel_side, stride in LAYERS:
        x = rng.normal(size=(16, side, side, channels)).astype(np.float32)
        kernel = rng.normal(size=(kernel_side, kernel_side, 1, channels)).astype(np.float32)
        cells = []
        for gradient in (False, True):
            times = []
            for conv in (grouped_conv, sum_of_shifts):
                forward = partial(conv, stride=stride)
                training = jax.value_and_grad(partial(loss, conv, stride), (0, 1))
                times.append(milliseconds(training if gradient else forward, x, kernel))
            cells.append(f'{times[0]:7.1f} {times[1]:6.1f} {times[0] / times[1]:5.1f}')
        print(f'{side:4} {channels:5} {kernel_side} {stride} |', ' | '.join(cells), flush=True)


if __name__ == '__main__':
    main()
