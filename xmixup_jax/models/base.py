"""What every backbone returns, and what several are made of."""

from typing import NamedTuple

import jax
from flax import nnx


class Outputs(NamedTuple):
    """One forward pass over B images."""

    logits: jax.Array
    """float32 [B, K]."""
    features: jax.Array
    """float32 [B, D], pooled, the head's input."""
    stages: tuple[jax.Array, ...]
    """The last feature map of each stage, [B, h, w, c]."""


def conv(inputs, outputs, kernel, stride, rngs, *, padding=None) -> nnx.Conv:
    """A convolution without bias; `kernel` is a side or (height, width), `padding` likewise.

    Padding is explicit where PyTorch's networks have it so: 'SAME' would pad a strided
    convolution on one side only. By default it keeps the size at stride 1.
    """
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    if padding is None:
        padding = tuple(side // 2 for side in kernel)
    elif isinstance(padding, int):
        padding = (padding, padding)
    return nnx.Conv(
        inputs,
        outputs,
        kernel,
        strides=stride,
        padding=padding,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
        rngs=rngs,
    )


def scaled(x: jax.Array, scales, stage: int) -> jax.Array:
    """The end of a stage, its channels times `scales[stage]`, if there are any scales."""
    return x if scales is None else x * scales[stage]
