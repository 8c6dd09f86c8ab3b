"""Convolutions that XLA is slow at on CPUs: depthwise ones, and those to very small maps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_SMALL = 3  # px, side of the result


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, **options
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for nnx.Conv: [B, H, W, C] by [k, k, C, D] to [B, h, w, D].

    On a CPU a convolution to very small maps is a matrix product: XLA's takes up to 90 times as
    long there (`python -m benchmarks.small_maps`), forward and for the gradient of its input. That
    is most of the time of a ResNet at 64 px, whose last maps are 2x2.
    """

    def usual(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    if kernel.shape[:2] == (1, 1):
        product = partial(pointwise_product, strides=strides)
        return jax.lax.platform_dependent(x, kernel, cuda=product, default=usual)
    shape = jax.eval_shape(usual, x, kernel).shape
    if max(shape[1:3]) > _SMALL:
        return usual(x, kernel)
    product = partial(matrix_product, strides=strides, padding=padding, shape=shape)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=usual)


def pointwise_product(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """A convolution with a kernel of one pixel, [1, 1, C, D], as a matrix product."""
    x = x[:, :: strides[0], :: strides[1]]
    return jax.lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


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


class DepthwiseConv(nnx.Module):
    """A depthwise convolution without bias, padded as TensorFlow's 'SAME'.

    On a CPU it is a sum over the places of the kernel: XLA's grouped convolution takes 3 to 46
    times as long there (`python -m benchmarks.depthwise`).
    """

    def __init__(self, channels: int, kernel: int, stride: int, rngs: nnx.Rngs):
        initializer = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')
        self.kernel = nnx.Param(initializer(rngs.params(), (kernel, kernel, 1, channels)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C]."""
        return jax.lax.platform_dependent(
            x,
            self.kernel[...].astype(x.dtype),
            cpu=lambda x, kernel: sum_of_shifts(x, kernel, self.stride),
            cuda=lambda x, kernel: sum_of_shifts(x, kernel, self.stride),
            default=lambda x, kernel: grouped_conv(x, kernel, self.stride),
        )


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The convolution as XLA has it; `kernel` is [k, k, 1, C]."""
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
    """The same, as the sum over the kernel's places of the shifted image times one weight."""
    return _sum_of_shifts(x, kernel, stride)


def _sum_of_shifts(x, kernel, stride):
    return _weighted_sum(_shifts(x, len(kernel), stride), kernel, x.dtype)


def _weighted_sum(parts, kernel, dtype):
    """Added up in float32, as cuDNN does it."""
    wide = jnp.promote_types(dtype, jnp.float32)
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(wide)
    total = sum(part.astype(wide) * weight for part, weight in zip(parts, flat, strict=True))
    return total.astype(dtype)


def _forward(x, kernel, stride):
    return _sum_of_shifts(x, kernel, stride), (x, kernel)


def _backward(stride, saved, grad):
    x, kernel = saved
    side, wide = len(kernel), jnp.promote_types(x.dtype, jnp.float32)

    def transposed(kernel, grad):
        return jax.linear_transpose(lambda x: _sum_of_shifts(x, kernel, stride), x)(grad)[0]

    def flipped(kernel, grad):
        return _input_gradient(kernel, grad, x.shape, stride)

    grad_x = jax.lax.platform_dependent(kernel, grad, cpu=transposed, default=flipped)

    def image_by_image(x, grad):
        def of_one(image_and_grad):
            image, grad = (each.astype(wide) for each in image_and_grad)
            return jnp.stack(
                [(p[0] * grad).sum((0, 1)) for p in _shifts(image[None], side, stride)]
            )

        # As one sum over the batch it takes three times as long on a CPU.
        return jax.lax.map(of_one, (x, grad)).sum(0)

    def gathered(x, grad):
        return _kernel_gradient(x, grad, side, stride)

    grad_kernel = jax.lax.platform_dependent(x, grad, cpu=image_by_image, default=gathered)
    return grad_x, grad_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _input_gradient(kernel, grad, shape: tuple[int, ...], stride: int):
    """The gradient of the input, [B, H, W, C], as the sum of shifts of `grad` with zeros between
    its pixels; the kernel is turned by 180 degrees."""
    side = len(kernel)
    pads = [(0, 0, 0)]
    for size, (before, _) in zip(shape[1:3], _paddings(shape, side, stride), strict=True):
        dilated = (-(-size // stride) - 1) * stride + 1
        left = side - 1 - before
        pads.append((left, size + side - 1 - left - dilated, stride - 1))
    padded = jax.lax.pad(grad, jnp.zeros((), grad.dtype), (*pads, (0, 0, 0)))
    return _weighted_sum(_slices(padded, side, shape[1:3], 1), kernel[::-1, ::-1], grad.dtype)


def _kernel_gradient(x, grad, side: int, stride: int):
    """The gradient of the kernel, [side * side, C], as one sum over all images and places.

    What each place of the kernel sees is looked up, so that a GPU does it in one program: a sum
    for each place would be as many.
    """
    (batch, *_, channels), outputs = x.shape, grad.shape[1:3]
    x = jnp.pad(x, ((0, 0), *_paddings(x.shape, side, stride), (0, 0)))
    places = np.arange(side)[:, None] + stride * np.arange(max(outputs))
    rows, columns = (places[:, :out] for out in outputs)
    indices = np.stack(
        np.broadcast_arrays(rows[:, None, :, None], columns[None, :, None, :]), axis=-1
    ).reshape(side * side, *outputs, 2)
    dimensions = jax.lax.GatherDimensionNumbers(
        offset_dims=(1, 4), collapsed_slice_dims=(1, 2), start_index_map=(1, 2)
    )
    seen = jax.lax.gather(x, indices, dimensions, (batch, 1, 1, channels), mode='promise_in_bounds')
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (seen.astype(wide) * grad.astype(wide)).sum((1, 2, 3))


sum_of_shifts.defvjp(_forward, _backward)


def _shifts(x: jax.Array, side: int, stride: int) -> list[jax.Array]:
    """What each place of a `side` x `side` kernel sees of x, row by row."""
    outputs = [-(-size // stride) for size in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *_paddings(x.shape, side, stride), (0, 0)))
    return _slices(x, side, outputs, stride)


def _paddings(shape: tuple[int, ...], side: int, stride: int) -> list[tuple[int, int]]:
    """Zeros before and after the rows, and the columns, of images [B, H, W, C]."""
    missing = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in shape[1:3]]
    return [(p // 2, p - p // 2) for p in missing]


def _slices(x, side: int, outputs, stride: int) -> list[jax.Array]:
    """The parts of padded images x, [B, h, w, C], that the places of a kernel meet."""
    height, width = [(out - 1) * stride + 1 for out in outputs]
    return [
        jax.lax.slice(
            x,
            (0, i, j, 0),
            (len(x), i + height, j + width, x.shape[3]),
            (1, stride, stride, 1),
        )
        for i in range(side)
        for j in range(side)
    ]
