"""Convolution to very small feature maps; on a CPU as a matrix product.

XLA's takes up to 90 times as long there (`python -m benchmarks.small_maps`), forward and for the
gradient by its input: most of the time of a ResNet at 64 px, whose last maps are 2x2.
"""

from functools import partial

import jax
import jax.numpy as jnp

_SMALL = 3  # px, side of the result


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, **options
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for nnx.Conv: [B, H, W, C] by [k, k, C, D] to [B, h, w, D]."""
    usual = partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options
    )
    shape = jax.eval_shape(usual, x, kernel).shape
    if max(shape[1:3]) > _SMALL or kernel.shape[:2] == (1, 1):
        return usual(x, kernel)
    product = partial(matrix_product, strides=strides, padding=padding, shape=shape)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=usual)


def matrix_product(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, shape: tuple[int, ...]
) -> jax.Array:
    """The same, of what the kernel sees at each place of the result, side by side, and the kernel.

    Args:
      x, kernel, strides, padding: as above.
      shape: of the result.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = [(n - 1) * stride + 1 for n, stride in zip(shape[1:3], strides, strict=True)]
    seen = [
        x[:, i : i + down : strides[0], j : j + right : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
