"""Keeps every unit within a maximal distance of its pre-trained weights.

Gouk, Hospedales, Pontil, "Distance-Based Regularisation of Deep Networks for Fine-Tuning"
(MARS-PGM), ICLR 2021, https://arxiv.org/abs/2002.08253. After each step the weights of each output
unit move back along the line to their start, until they are at most `distance` away in the 1-norm:

    w <- w0 + (w - w0) / max(1, ||w - w0||_1 / distance)

A unit is a column of the kernel [..., inputs, outputs]. The head's start is 0, its distance
`head_distance`. The scale of batch norm counts divided by the standard deviation that it is applied
with: scale / sqrt(var) stays within `distance` of its start. Biases and shifts are free.

The form is that of the authors' code (henrygouk/mars-finetuning), which tunes both distances for
each data set between 1.65 and 33; 20 is PaddleTransfer's. The authors train by Adam without weight
decay; PaddleTransfer and this code use SGD with weight decay. A unit of a depthwise convolution is
one channel here, as in the paper and PaddleTransfer; the authors' code bounds the whole kernel of
such a layer at once, so that its distances do not carry over to EfficientNet.
"""

from dataclasses import replace

import jax.numpy as jnp

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import positive
from xmixup_jax.methods.parts import reference
from xmixup_jax.optimizer import HEAD

EPSILON = 1e-6  # of the standard deviation, as in the authors' code


def mars_projection(kernel, start, distance):
    """Moves the columns of a kernel back to at most `distance` from those of its start.

    Args:
      kernel, start: [..., outputs].
      distance: > 0, of the sums of absolute values over all axes but the last.

    >>> kernel = jnp.array([[1.0, 4.0], [1.0, -4.0]])
    >>> mars_projection(kernel, jnp.zeros((2, 2)), 4.0).tolist()
    [[1.0, 2.0], [1.0, -2.0]]
    """
    difference = kernel - start
    norms = jnp.abs(difference).sum(axis=tuple(range(kernel.ndim - 1)))
    return start + difference / jnp.maximum(1.0, norms / distance)


def project_scale(scale, start, var, start_var, distance):
    """Projects batch norm's scale, relative to the standard deviation; all arguments are [C]."""
    deviation, start_deviation = (jnp.sqrt(v + EPSILON) for v in (var, start_var))
    origin = start / start_deviation
    difference = scale / deviation - origin
    projected = (origin + jnp.clip(difference, -distance, distance)) * deviation
    # Within the distance it stays as it is, to the last digit: it may be frozen.
    return jnp.where(jnp.abs(difference) <= distance, scale, projected)


def _projected(params, start, stats, start_stats, distance):
    """Projects a nested dict of layers; `stats` has the layers with batch norm."""
    result = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            inner = stats.get(name, {}), start_stats.get(name, {})
            result[name] = _projected(leaf, start[name], *inner, distance)
        elif name == 'kernel':
            result[name] = mars_projection(leaf, start[name], distance)
        elif name == 'scale' and 'var' in stats:
            variances = stats['var'], start_stats['var']
            result[name] = project_scale(leaf, start[name], *variances, distance)
        else:
            result[name] = leaf
    return result


def after_step(view: View, state):
    options, start = view.options, view.constants
    params = _projected(
        state.params, start['params'], state.batch_stats, start['batch_stats'], options.distance
    )
    head = dict(state.params[HEAD])
    head['kernel'] = mars_projection(
        head['kernel'], jnp.zeros_like(head['kernel']), options.head_distance
    )
    return replace(state, params=params | {HEAD: head})


METHOD = Method(
    options={
        'distance': positive(20.0, "maximal 1-norm of a unit's change", traced=True),
        'head_distance': positive(20.0, 'maximal distance of the head from 0', traced=True),
    },
    after_step=after_step,
    prepare=reference,
    needs_backbone=True,
)
