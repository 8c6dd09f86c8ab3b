"""What every backbone returns, and what several are made of."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.cpu import convolution


class Outputs(NamedTuple):
    """One forward pass over B images; float32 whatever the network computes in."""

    logits: jax.Array
    """[B, K]."""
    features: jax.Array
    """[B, D], pooled, the head's input."""
    stages: tuple[jax.Array, ...]
    """The last feature map of each stage, [B, h, w, c]."""
    convs: tuple[jax.Array, ...] = ()
    """The output of each stage's last convolution, before its batch norm, [B, h, w, c]. Networks
    whose stages do not end in a single convolution repeat `stages`."""


MOMENTUM = 0.9
"""Share of the moving statistics that a training step keeps (PyTorch's momentum is 0.1)."""


class BatchNorm(nnx.BatchNorm):
    """Statistics and normalisation in float32, the result in the input's dtype.

    Training normalises by the statistics of the whole batch, over all devices.
    """

    frozen = False
    """Whether the layer keeps and uses the stored statistics in training, see config.freeze."""

    def __init__(self, num_features, *, epsilon, rngs):
        super().__init__(
            num_features, momentum=MOMENTUM, epsilon=epsilon, axis_name='batch', rngs=rngs
        )

    def __call__(self, x, use_running_average=None):
        return super().__call__(x, use_running_average=use_running_average).astype(x.dtype)

    def batch_moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and (biased) variance of each channel over the whole batch, float32 [C] each."""
        x = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        mean, square = jax.lax.pmean((x.mean(axes), jnp.square(x).mean(axes)), self.axis_name)
        return mean, jnp.maximum(square - jnp.square(mean), 0.0)


class FrozenBatchNorm(BatchNorm):
    """Normalises by the stored statistics in training too, and never changes them."""

    def __call__(self, x, use_running_average=None):
        del use_running_average
        return super().__call__(x, use_running_average=True)


class MixedBatchNorm(BatchNorm):
    """Training normalises by the mean of the stored and the batch's statistics.

    The mixture of both means and both variances is that of You, Li, Zhao, "Test-time Batch
    Statistics Calibration for Covariate Shift" (arXiv 2110.04065), with equal weights. What this
    layer leaves in `mean` and `var` is the usual moving average, from which `batch_moments` can
    be read off; the training step keeps the stored ones.
    """

    def __call__(self, x, use_running_average=None):
        if self.use_running_average or use_running_average:
            return super().__call__(x, use_running_average=True)
        stored = self.mean[...], self.var[...]
        batch = self.batch_moments(x)
        self.mean[...], self.var[...] = (
            (old + new) / 2 for old, new in zip(stored, batch, strict=True)
        )
        y = super().__call__(x, use_running_average=True)
        self.mean[...], self.var[...] = (
            MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(stored, batch, strict=True)
        )
        return y


def batch_part(moved, stored):
    """The batch's statistics, from the moving ones after and before it; trees of arrays."""
    return jax.tree.map(lambda new, old: (new - MOMENTUM * old) / (1 - MOMENTUM), moved, stored)


BATCH_NORMS = {'batch': BatchNorm, 'frozen': FrozenBatchNorm, 'mixed': MixedBatchNorm}
HEAD_INITS = ('uniform', 'normal', 'zero')


def draw_head(key: jax.Array, inputs: int, outputs: int, law: str) -> dict[str, jax.Array]:
    """A new head: 'kernel' float32 [D, K] and 'bias' [K].

    Args:
      key: random key.
      inputs, outputs: D and K.
      law: 'uniform', as PyTorch's `Linear` (kernel and bias in +-1/sqrt(D)); 'normal' (kernel with
        standard deviation 0.01, bias 0); 'zero'.

    >>> head = draw_head(jax.random.key(0), 100, 5, 'uniform')
    >>> head['kernel'].shape, bool(jnp.abs(head['bias']).max() <= 0.1)
    ((100, 5), True)
    """
    zeros = {'kernel': jnp.zeros((inputs, outputs)), 'bias': jnp.zeros(outputs)}
    if law == 'zero':
        return zeros
    keys = dict(zip(zeros, jax.random.split(key), strict=True))
    if law == 'normal':
        return zeros | {'kernel': 0.01 * jax.random.normal(keys['kernel'], (inputs, outputs))}
    if law == 'uniform':
        bound = inputs**-0.5
        return {
            name: jax.random.uniform(keys[name], leaf.shape, minval=-bound, maxval=bound)
            for name, leaf in zeros.items()
        }
    raise ValueError(f'law must be one of {HEAD_INITS}, not {law!r}')


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


def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's Phi(x), without the usual approximation by a tanh."""
    return nnx.gelu(x, approximate=False)


class Mlp(nnx.Module):
    """Two layers with a GELU between them, four times as wide; over the last axis."""

    def __init__(self, width: int, rngs: nnx.Rngs, act: Callable = exact_gelu):
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


def renamed(key: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    """A key by the first pattern that matches all of it; None if none does.

    Args:
      key: of a tensor in a file of weights.
      patterns: (regular expression, replacement as of `re.Match.expand`).

    >>> renamed('ln.weight', [(r'ln\\.(.*)', r'norm.\\1')])
    'norm.weight'
    """
    matches = ((re.fullmatch(pattern, key), replacement) for pattern, replacement in patterns)
    return next((match.expand(replacement) for match, replacement in matches if match), None)


def at_least_float32(x: jax.Array) -> jax.Array:
    """float32 from narrower types, float64 as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def run_block(block: Callable, x: jax.Array, remat: bool, *args):
    """`block(x, *args)`; with `remat` its inside is computed again for the gradient, not kept."""
    return nnx.remat(lambda block, x: block(x, *args))(block, x) if remat else block(x, *args)


Hook = Callable[[jax.Array, int, str], jax.Array]
"""(x, stage, place) to what takes the place of x, [B, h, w, c] (of a ViT [B, n, c]). Places are
'conv', the output of the stage's last convolution, and 'end', the end of the stage; stages count
from 0."""


def at_hook(x: jax.Array, hook: Hook | None, stage: int, place: str) -> jax.Array:
    """`hook(x, stage, place)`, or x where there is no hook."""
    return x if hook is None else hook(x, stage, place)
