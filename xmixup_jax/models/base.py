"""What every backbone returns, and what several are made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.small_maps import convolution


class Outputs(NamedTuple):
    """One forward pass over B images; float32 whatever the network computes in."""

    logits: jax.Array
    """[B, K]."""
    features: jax.Array
    """[B, D], pooled, the head's input."""
    stages: tuple[jax.Array, ...]
    """The last feature map of each stage, [B, h, w, c]."""


class BatchNorm(nnx.BatchNorm):
    """Statistics and normalisation in float32, the result in the input's dtype."""

    def __call__(self, x, use_running_average=None):
        return super().__call__(x, use_running_average=use_running_average).astype(x.dtype)


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
        conv_general_dilated=convolution,
        kernel_init=nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
        rngs=rngs,
    )


def at_least_float32(x: jax.Array) -> jax.Array:
    """float32 from narrower types, float64 as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def run_block(block: nnx.Module, x: jax.Array, remat: bool) -> jax.Array:
    """`block(x)`; with `remat` what is inside is computed again for the gradient, not kept."""
    return nnx.remat(lambda block, x: block(x))(block, x) if remat else block(x)


def after_stage(x: jax.Array, hook, stage: int) -> jax.Array:
    """What goes on from the end of a stage: `hook(x, stage)`, if there is a hook."""
    return x if hook is None else hook(x, stage)
