"""Replaces convolutions that XLA runs slowly on CPUs: depthwise ones, pointwise ones, and those to
tiny maps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

_SMALL = 3  # px, largest side of an output map that counts as tiny
# Smallest sides, px, of the depthwise kernels ...
_SHIFTED = 5  # ... whose gradient by the images is a sum of shifts as well
_LOOPED = 7  # ... whose gradient by the kernel is computed in a loop
_any_platform = ContextVar('_any_platform', default=False)


@contextmanager
def any_platform() -> Iterator[None]:
    """Within it, networks are traced for every platform, so that they can be exported."""
    token = _any_platform.set(True)
    try:
        yield
    finally:
        _any_platform.reset(token)


def by_platform(x: jax.Array, kernel: jax.Array, *, cpu: Callable, default: Callable) -> jax.Array:
    """Calls `cpu(x, kernel)` on a CPU, and `default(x, kernel)` elsewhere.

    The default backend decides, unless the program is for `any_platform`. Keeping both forms in a
    program makes a step of EfficientNet-Lite0 take 1.3 times as long to trace.
    """
    if _any_platform.get():
        return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)
    return (cpu if jax.default_backend() == 'cpu' else default)(x, kernel)


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, **options
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for nnx.Conv; on a CPU a matrix product if that is faster.

    A product is faster for tiny maps, which dominate the time of a ResNet at 64 px, and for 1x1
    kernels, whose gradient XLA computes slowly (`python -m benchmarks.convolutions`).

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D].
      strides, padding, options: as for `jax.lax.conv_general_dilated`.

    Returns:
      [B, h, w, D].
    """

    def usual(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    shape = jax.eval_shape(usual, x, kernel).shape
    if max(shape[1:3]) > _SMALL and kernel.shape[:2] != (1, 1):
        return usual(x, kernel)
    product = partial(matrix_product, strides=strides, padding=padding, shape=shape)
    return by_platform(x, kernel, cpu=product, default=usual)


def matrix_product(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, shape: tuple[int, ...]
) -> jax.Array:
    """Computes the convolution as a matrix product of image patches and kernel (im2col).

    Args:
      x, kernel, strides, padding: as in `convolution`.
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
    rows = jnp.concatenate(seen, axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    # XLA copies operands of more than two dimensions for the gradient by the kernel.
    return (rows.reshape(-1, len(matrix)) @ matrix).reshape(shape)


class DepthwiseConv(nnx.Module):
    """A depthwise convolution with TensorFlow's padding 'SAME'.

    On a CPU it is computed as a sum over the positions in the kernel, since XLA's grouped
    convolution takes 3 to 31 times as long (`python -m benchmarks.depthwise`).
    """

    def __init__(
        self, channels: int, kernel: int, stride: int, rngs: nnx.Rngs, *, use_bias: bool = False
    ):
        initializer = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')
        self.kernel = nnx.Param(initializer(rngs.params(), (kernel, kernel, 1, channels)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(channels))
        self.use_bias = use_bias
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C]."""
        y = by_platform(
            x,
            self.kernel[...].astype(x.dtype),
            cpu=lambda x, kernel: sum_of_shifts(x, kernel, self.stride),
            default=lambda x, kernel: grouped_conv(x, kernel, self.stride),
        )
        return y + self.bias[...].astype(y.dtype) if self.use_bias else y


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's depthwise convolution; `kernel` is [k, k, 1, C]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_of_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes `grouped_conv` as a sum over kernel positions of shifted images times weights."""
    return _sum_of_shifts(x, kernel, stride)


def _sum_of_shifts(x, kernel, stride):
    flat = kernel.reshape(-1, x.shape[-1])
    return sum(
        part * weight for part, weight in zip(_shifts(x, len(kernel), stride), flat, strict=True)
    )


def _forward(x, kernel, stride):
    return _sum_of_shifts(x, kernel, stride), (x, kernel)


def _backward(stride, saved, grad):
    x, kernel = saved
    side, channels = len(kernel), x.shape[-1]
    grad_x = _gradient_of_images(x, kernel, stride, grad)
    if side >= _LOOPED and side % 2 and stride == 1:
        return grad_x, _kernel_gradient_in_a_loop(x, grad, side).reshape(kernel.shape)
    ones = jnp.ones((1, grad.shape[1] * grad.shape[2]), grad.dtype)

    def one_image(image_and_grad):
        image, grad = image_and_grad
        parts = _shifts(image[None], side, stride)
        # For most layers a product with ones takes less time than a reduction.
        return jnp.concatenate([ones @ (part[0] * grad).reshape(-1, channels) for part in parts])

    # One sum over the whole batch takes several times as long as image by image.
    grad_kernel = jax.lax.map(one_image, (x, grad)).sum(0)
    return grad_x, grad_kernel.reshape(kernel.shape)


def _gradient_of_images(x, kernel, stride, grad):
    """The gradient of `sum_of_shifts` by the images."""
    side = len(kernel)
    if side < _SHIFTED or not side % 2:
        (grad_x,) = jax.linear_transpose(lambda x: _sum_of_shifts(x, kernel, stride), x)(grad)
        return grad_x
    # The transpose pads a map for each position in the kernel. Shifts of the output's gradient take
    # less time, although a strided convolution needs zeros between its pixels.
    edges = []
    for size, count in zip(x.shape[1:3], grad.shape[1:3], strict=True):
        before = (side - 1) - max((count - 1) * stride + side - size, 0) // 2
        reached = before + (count - 1) * stride + 1
        edges.append((before - side // 2, size + side // 2 - reached, stride - 1))
    zero = jnp.zeros((), grad.dtype)
    return _sum_of_shifts(
        jax.lax.pad(grad, zero, ((0, 0, 0), *edges, (0, 0, 0))), kernel[::-1, ::-1], 1
    )


sum_of_shifts.defvjp(_forward, _backward)


def _kernel_gradient_in_a_loop(x, grad, side):
    """The kernel's gradient at stride 1, in a loop: 49 unrolled positions compile for seconds."""
    margin = side // 2
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def one_image(image_and_grad):
        image, grad = image_and_grad

        def at(place):
            seen = jax.lax.dynamic_slice(image, (place // side, place % side, 0), grad.shape)
            return (seen * grad).sum((0, 1))

        return jax.lax.map(at, jnp.arange(side * side))

    return jax.lax.map(one_image, (x, grad)).sum(0)


def _shifts(x: jax.Array, side: int, stride: int) -> list[jax.Array]:
    """The pixels of x under each position of a `side` x `side` kernel, row by row."""
    batch, *sizes, channels = x.shape
    outputs = [-(-size // stride) for size in sizes]
    missing = [
        max((out - 1) * stride + side - size, 0) for out, size in zip(outputs, sizes, strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in missing), (0, 0)))
    height, width = [(out - 1) * stride + 1 for out in outputs]
    return [
        jax.lax.slice(
            x, (0, i, j, 0), (batch, i + height, j + width, channels), (1, stride, stride, 1)
        )
        for i in range(side)
        for j in range(side)
    ]
