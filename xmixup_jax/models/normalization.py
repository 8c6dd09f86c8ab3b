"""Batch norm, fused with the residual sum and the activation that follow it.

On a GPU a training step is bound by the memory traffic of its activations, and most of that traffic
belongs to batch norm. There `normalize` has a gradient of its own, which keeps only the input (the
convolution's output), the result (the next convolution's input) and statistics of each channel. It
recomputes the normalised map and the activation's mask, and passes over the activations twice where
the program made from autodiff passes over them three times. `python -m benchmarks.ahead` counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.base import at_least_float32

AXIS = 'batch'
MOMENTUM = 0.9
"""Weight of the old moving statistics in an update; PyTorch's momentum is 1 minus this."""


def _is_positive(x: jax.Array) -> jax.Array:
    """1.0 or 0.0. XLA fuses this arithmetic into sums, but writes a map of booleans first."""
    return jnp.clip(jnp.ceil(x), 0.0, 1.0)


ACTS = {'': lambda x: x, 'relu': nnx.relu, 'relu6': nnx.relu6}
SLOPES: dict[str, Callable[[jax.Array], Any]] = {
    '': lambda x: 1.0,
    'relu': _is_positive,
    'relu6': lambda x: _is_positive(x) * _is_positive(6.0 - x),
}
"""Derivatives of ACTS by their arguments in float32; 0 at the kinks, as in PyTorch."""


class Moments(NamedTuple):
    """Statistics of each channel, float32 [C] each."""

    mean: jax.Array
    var: jax.Array
    """Biased."""


Groups = tuple[tuple[int, ...], ...] | None
"""Positions on AXIS of the devices that share statistics; None: all of them do."""


def _mean_over(groups: Groups, values):
    """The mean over the devices of a group."""
    if groups and len(groups[0]) == 1:
        return values
    return jax.lax.pmean(values, AXIS, axis_index_groups=groups)


def batch_moments(x: jax.Array, groups: Groups) -> Moments:
    """The statistics of the batch on the devices of a group."""
    x, axes = at_least_float32(x), tuple(range(x.ndim - 1))
    mean, square = _mean_over(groups, jnp.stack([x.mean(axes), jnp.square(x).mean(axes)]))
    return Moments(mean, jnp.maximum(square - jnp.square(mean), 0.0))


def _affine(x, moments: Moments, scale, bias, epsilon: float):
    """The normalised map in at least float32."""
    return (at_least_float32(x) - moments.mean) * (
        jax.lax.rsqrt(moments.var + epsilon) * scale
    ) + bias


def apply(x, residual, moments: Moments, scale, bias, epsilon: float, act: str) -> jax.Array:
    """Normalises by given statistics, adds the residual, and applies the activation.

    Args:
      x: [..., C].
      residual: like x, or None.
      moments: to normalise by.
      scale, bias: float32 [C].
      epsilon: added to the variance.
      act: a key of ACTS.

    Returns:
      the dtype and shape of x; in between it computes in float32.
    """
    y = _affine(x, moments, scale, bias, epsilon).astype(x.dtype)
    return ACTS[act](y if residual is None else residual + y)


def normalize(
    act: str,
    epsilon: float,
    groups: Groups,
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    stored: Moments,
    weight: jax.Array,
) -> tuple[jax.Array, Moments]:
    """`apply` in training: by a weighted mean of the batch's and the stored statistics.

    The gradient goes through the batch's statistics; none flows through the returned ones, `stored`
    or `weight`.

    Args:
      act, epsilon, x, residual, scale, bias: as in `apply`; under a mapped axis AXIS.
      groups: of devices.
      stored: the moving statistics.
      weight: of the batch's statistics, from 0 to 1; a number or [C].

    Returns:
      (as from `apply`; the statistics of the batch).
    """
    # XLA for TPUs fuses the usual form into convolutions, so that ours gains nothing there.
    form = normalize_on_gpu if jax.default_backend() == 'gpu' else _normalize
    return form(act, epsilon, groups, x, residual, scale, bias, stored, weight)


def _normalize(act, epsilon, groups, x, residual, scale, bias, stored, weight):
    batch = batch_moments(x, groups)
    used = _mixed(batch, stored, weight)
    out = apply(x, residual, used, scale, bias, epsilon, act)
    return out, jax.lax.stop_gradient(batch)


def _mixed(batch: Moments, stored: Moments, weight) -> Moments:
    """The statistics to normalise by."""
    pairs = zip(batch, stored, strict=True)
    return Moments(*(weight * new + (1 - weight) * old for new, old in pairs))


# `normalize` with a gradient of its own, which is 0 at the kinks of the activation, as in PyTorch.
normalize_on_gpu = jax.custom_vjp(_normalize, nondiff_argnums=(0, 1, 2))


def _forward(act, epsilon, groups, x, residual, scale, bias, stored, weight):
    out, batch = _normalize(act, epsilon, groups, x, residual, scale, bias, stored, weight)
    # The result tells where the activation was cut off if `x` alone does not.
    kept = out if act and residual is not None else None
    marker = None if residual is None else jnp.zeros((), residual.dtype)
    used = _mixed(batch, stored, weight)
    return (out, batch), (x, marker, kept, scale, bias, batch, used, weight)


def _backward(act, epsilon, groups, saved, cotangents):
    x, marker, out, scale, bias, batch, used, weight = saved
    has_residual = marker is not None
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    inverse = jax.lax.rsqrt(used.var + epsilon)

    def before_act(x, out, grad):
        """The gradient of the activation's input."""
        y = _affine(x, used, scale, bias, epsilon) if out is None else at_least_float32(out)
        return at_least_float32(grad) * SLOPES[act](y)

    def centred(x):
        return at_least_float32(x) - batch.mean

    # XLA would write a map that several kernels need, such as a mask, and read it in each. The
    # barriers make it compute such maps again: here those of the forward pass ...
    x, out, grad = jax.lax.optimization_barrier((x, out, cotangents[0]))
    inner = before_act(x, out, grad)
    if has_residual:
        grad = inner.astype(x.dtype)
        inner = at_least_float32(grad)
    total = inner.sum(axes)
    product = (inner * centred(x)).sum(axes) + total * (batch.mean - used.mean)
    means = _mean_over(groups, (total / count, product / count))
    # ... and here those of the sums.
    x_again, grad_again, (mean, mean_product) = jax.lax.optimization_barrier((x, grad, means))
    inner = at_least_float32(grad_again) if has_residual else before_act(x_again, out, grad_again)
    slope = weight * jnp.square(inverse) * mean_product
    grad_x = (inner - weight * mean - slope * centred(x_again)) * (scale * inverse)
    return (
        grad_x.astype(x.dtype),
        grad if has_residual else None,
        inverse * product,
        total,
        Moments(jnp.zeros_like(batch.mean), jnp.zeros_like(batch.var)),
        jnp.zeros_like(weight),
    )


normalize_on_gpu.defvjp(_forward, _backward)


class BatchNorm(nnx.Module):
    """Batch norm over groups of devices, with a residual sum and an activation.

    It computes in float32 and returns the dtype of its input. In training it normalises by the
    statistics of the batch on the devices of a group.
    """

    frozen = False
    """Whether training uses the stored statistics and does not update them, see config.freeze."""

    def __init__(self, num_features: int, *, epsilon: float, rngs, groups: Groups = None):
        shape = (num_features,)
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.var = nnx.BatchStat(jnp.ones(shape))
        # The keys are unused, but with them a seed draws the same network as with nnx.BatchNorm.
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), shape))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), shape))
        self.num_features, self.epsilon, self.groups = num_features, epsilon, groups
        self.use_running_average = False  # set by nnx.Module.train and eval

    def __call__(self, x: jax.Array, residual: jax.Array | None = None, act: str = '') -> jax.Array:
        """Maps [..., C] to the same; `residual` and `act` are as in `apply`."""
        if self.use_running_average:
            return self.by_stored(x, residual, act)
        stored = Moments(self.mean[...], self.var[...])
        static, affine = (act, self.epsilon, self.groups), (self.scale[...], self.bias[...])
        out, batch = normalize(*static, x, residual, *affine, stored, self.weight())
        self.mean[...], self.var[...] = self.moved(stored, batch, x.size // x.shape[-1])
        return out

    def by_stored(self, x: jax.Array, residual: jax.Array | None, act: str) -> jax.Array:
        """Normalises by the moving statistics."""
        stored = Moments(self.mean[...], self.var[...])
        return apply(x, residual, stored, self.scale[...], self.bias[...], self.epsilon, act)

    def weight(self) -> jax.Array:
        """The weight of the batch's statistics in training, a number or [C]."""
        return jnp.ones(())

    def moved(self, stored: Moments, batch: Moments, count: int) -> Moments:
        """The moving statistics after a batch with `count` values of each channel on a device."""
        del count
        pairs = zip(stored, batch, strict=True)
        return Moments(*(MOMENTUM * old + (1 - MOMENTUM) * new for old, new in pairs))


class FrozenBatchNorm(BatchNorm):
    """Batch norm that uses the stored statistics in training too, and never updates them."""

    def __call__(self, x, residual=None, act=''):
        return self.by_stored(x, residual, act)


class MixedBatchNorm(BatchNorm):
    """Batch norm whose training uses the average of the stored statistics and the batch's.

    Both means and both variances are averaged, as in You, Li, Zhao, "Test-time Batch Statistics
    Calibration for Covariate Shift" (https://arxiv.org/abs/2110.04065), with equal weights. The
    layer leaves the usual moving averages in `mean` and `var`, from which `batch_part` recovers the
    batch's statistics; the training step discards them and keeps the stored ones.
    """

    def weight(self):
        return jnp.full((), 0.5)


def batch_part(moved, stored):
    """Recovers the statistics of a batch from the moving ones after and before it.

    Args:
      moved, stored: moving statistics after and before the batch; trees of the same structure.
    """
    return jax.tree.map(lambda new, old: (new - MOMENTUM * old) / (1 - MOMENTUM), moved, stored)


def over_devices(moments):
    """Means and variances of the whole batch from those of each device, under the axis 'batch'.

    With config.batch_norm_over the devices have means of their own. Their spread belongs to the
    variance of the whole batch.

    Args:
      moments: nested dicts of {'mean' [C], 'var' [C]}.
    """
    if 'var' not in moments:
        return {name: over_devices(inner) for name, inner in moments.items()}
    mean = jax.lax.pmean(moments['mean'], 'batch')
    var = jax.lax.pmean(moments['var'] + jnp.square(moments['mean'] - mean), 'batch')
    return {'mean': mean, 'var': var}


BATCH_NORMS = {'batch': BatchNorm, 'frozen': FrozenBatchNorm, 'mixed': MixedBatchNorm}
