"""Max pooling whose gradient needs one small map of positions."""

import jax
import jax.numpy as jnp
from flax import nnx


def max_pool(x: jax.Array, side: int, stride: int, padding: int = 0) -> jax.Array:
    """Takes the maximum in square windows.

    The gradient of a window goes to its first maximum, row by row, as in PyTorch.

    Args:
      x: [B, H, W, C], floating point.
      side: of the windows, px; at most 16.
      stride: px.
      padding: px on each side; never a maximum.

    Returns:
      [B, h, w, C].
    """
    form = usual_max_pool if jax.default_backend() == 'tpu' else max_pool_with_positions
    return form(x, side, stride, padding)


def usual_max_pool(x: jax.Array, side: int, stride: int, padding: int) -> jax.Array:
    """`max_pool` with the gradient that JAX derives."""
    return nnx.max_pool(x, (side, side), (stride, stride), ((padding, padding),) * 2)


# Its gradient takes a fifth of the time on a CPU, and XLA for GPUs moves a quarter of the bytes for
# it. XLA for TPUs would move more.
max_pool_with_positions = jax.custom_vjp(usual_max_pool, nondiff_argnums=(1, 2, 3))


def _forward(x, side, stride, padding):
    borders = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x, borders, constant_values=-jnp.inf)
    sizes = [(size - side) // stride + 1 for size in padded.shape[1:3]]
    parts = [
        padded[
            :,
            row : row + (sizes[0] - 1) * stride + 1 : stride,
            column : column + (sizes[1] - 1) * stride + 1 : stride,
        ]
        for row, column in _offsets(side)
    ]
    # The maximum of the slices and its position make one kernel.
    largest = parts[0]
    for part in parts[1:]:
        largest = jnp.maximum(largest, part)
    position = jnp.zeros(largest.shape, jnp.uint8)
    for i in reversed(range(len(parts))):
        position = jnp.where(parts[i] == largest, jnp.uint8(i), position)
    return largest, (position, x.shape)


def _backward(side, stride, padding, saved, grad):
    position, shape = saved
    zero = jnp.zeros((), grad.dtype)
    sizes = [size + 2 * padding for size in shape[1:3]]
    total = jnp.zeros((), grad.dtype)
    for i, (row, column) in enumerate(_offsets(side)):
        own = jnp.where(position == i, grad, zero)
        lows = row, column
        edges = [
            (low, size - low - (count - 1) * stride - 1, stride - 1)
            for low, size, count in zip(lows, sizes, grad.shape[1:3], strict=True)
        ]
        total += jax.lax.pad(own, zero, ((0, 0, 0), *edges, (0, 0, 0)))
    ends = [padding + size for size in shape[1:3]]
    return (total[:, padding : ends[0], padding : ends[1]],)


max_pool_with_positions.defvjp(_forward, _backward)


def _offsets(side: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(side) for column in range(side)]
