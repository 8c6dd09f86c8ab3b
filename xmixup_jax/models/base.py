"""The output of every backbone, and layers that several of them share."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.cpu import convolution


class Outputs(NamedTuple):
    """The outputs for B images; float32 whatever the precision of the network."""

    logits: jax.Array
    """[B, K]."""
    features: jax.Array
    """[B, D], pooled: the input of the head."""
    stages: tuple[jax.Array, ...]
    """The last feature map of each stage, [B, h, w, c]."""
    convs: tuple[jax.Array, ...] = ()
    """The output of each stage's last convolution, before its batch norm, [B, h, w, c]. For
    networks whose stages do not end in a single convolution, the same as `stages`."""


class Keys:
    """Draws the same keys as `nnx.Rngs(seed).params`.

    Its counter is a number in place of an array, so that a network is traced in a third of the
    time.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> jax.Array:
        """The next key."""
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


HEAD_INITS = ('uniform', 'normal', 'zero')


def draw_head(key: jax.Array, inputs: int, outputs: int, law: str) -> dict[str, jax.Array]:
    """Draws the parameters of a new head.

    Args:
      key: random key.
      inputs, outputs: D and K.
      law: the distribution. 'uniform': kernel and bias in +-1/sqrt(D), as PyTorch's `Linear`;
        'normal': kernel with standard deviation 0.01, bias 0; 'zero'.

    Returns:
      {'kernel' float32 [D, K], 'bias' float32 [K]}.

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
    """Makes a convolution without bias.

    Args:
      inputs, outputs: numbers of channels.
      kernel: side, or (height, width).
      stride: of both axes.
      rngs: for the parameters.
      padding: a number, one number for each axis, or 'SAME'. By default it keeps the size of the
        map at stride 1. PyTorch's networks pad both sides explicitly, whereas 'SAME' may pad a
        strided convolution on one side only.
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
    """GELU, x * Phi(x) with the normal distribution function Phi; not the tanh approximation."""
    return nnx.gelu(x, approximate=False)


class Mlp(nnx.Module):
    """Two linear layers on the last axis, four times as wide in between, with a GELU."""

    def __init__(self, width: int, rngs: nnx.Rngs, act: Callable = exact_gelu):
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


def rename_key(key: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    """Renames a key by the first pattern that matches it entirely.

    Args:
      key: of a tensor in a weights file.
      patterns: (regular expression, replacement), the latter as for `re.Match.expand`.

    Returns:
      the new key; None if no pattern matches.

    >>> rename_key('ln.weight', [(r'ln\\.(.*)', r'norm.\\1')])
    'norm.weight'
    """
    matches = ((re.fullmatch(pattern, key), replacement) for pattern, replacement in patterns)
    return next((match.expand(replacement) for match, replacement in matches if match), None)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Converts narrower types to float32; leaves float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def run_block(block: Callable, x: jax.Array, remat: bool, *args):
    """Runs `block(x, *args)`; with `remat`, the backward pass recomputes its activations."""
    return nnx.remat(lambda block, x: block(x, *args))(block, x) if remat else block(x, *args)


Hook = Callable[[jax.Array, int, str], jax.Array]
"""Maps (x, stage, place) to a replacement of x, [B, h, w, c] (in a ViT [B, n, c]). `stage` counts
from 0. `place` is 'conv', the output of the stage's last convolution, or 'end', the end of the
stage. From the one to the other each channel is computed by itself, as `methods.delta` needs."""


def apply_hook(x: jax.Array, hook: Hook | None, stage: int, place: str) -> jax.Array:
    """Returns `hook(x, stage, place)`, or x if there is no hook."""
    return x if hook is None else hook(x, stage, place)
