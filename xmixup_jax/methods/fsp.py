"""Keeps the flow between feature maps close to the pre-trained network's.

Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning" (FSP), CVPR 2017, equations 1 and 2,
https://doi.org/10.1109/CVPR.2017.754. The flow of a stage is the Gram matrix between the maps
F [h, w, C] that enter it and the maps F' [h, w, C'] that leave it,

    G_ij = sum over positions of F_i F'_j / (h w),    penalty = weight * mean of (G - G0)^2

summed over the second to the last stage. The larger map is average-pooled to the smaller one's
size, by adaptive windows. Windows and means over batch and matrix are those of RepDistiller
(HobbitLong/RepDistiller, `FSP.py`), which also counts the flow from the stem to the first stage.

Paper and RepDistiller minimise the distance alone, in a stage before the training on labels. A
network that begins as its own reference has distance 0 (if batch norm uses the pre-trained
statistics), so that stage would do nothing. Here the distance is a penalty beside the
cross-entropy, and its weight is this project's choice.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import non_negative
from xmixup_jax.methods.parts import reference, reference_outputs


def teach(view: View):
    return reference_outputs(view).stages


def _windows(size, pooled):
    """Means over adaptive windows, as a matrix [pooled, size]."""
    place = np.arange(size)
    starts = np.arange(pooled) * size // pooled
    ends = -(-np.arange(1, pooled + 1) * size // pooled)
    inside = (place >= starts[:, None]) & (place < ends[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def adaptive_pool(maps, height, width):
    """[B, h, w, C] to [B, height, width, C]: means over the windows floor(i h / height) to
    ceil((i + 1) h / height), as PyTorch's `adaptive_avg_pool2d`.

    >>> adaptive_pool(jnp.arange(3.0).reshape(1, 3, 1, 1), 2, 1).ravel().tolist()
    [0.5, 1.5]
    """
    rows, columns = _windows(maps.shape[1], height), _windows(maps.shape[2], width)
    return jnp.einsum('ph,qw,bhwc->bpqc', rows, columns, maps, precision='highest')


def flow(before, after):
    """The Gram matrix [B, C, C'] between the maps [B, h, w, C] and [B, h', w', C'] of a stage."""
    height, width = (min(before.shape[i], after.shape[i]) for i in (1, 2))
    before, after = (adaptive_pool(maps, height, width) for maps in (before, after))
    return jnp.einsum('bhwi,bhwj->bij', before, after) / (after.shape[1] * after.shape[2])


def flow_distance(stages, reference_stages):
    """The sum over the stages of the mean of (G - G0)^2.

    Args:
      stages: the maps at the end of each stage, [B, h, w, C] each.
      reference_stages: the reference network's.

    >>> maps = [jnp.ones((1, 2, 2, 3)), jnp.ones((1, 1, 1, 4))]
    >>> float(flow_distance(maps, [2 * maps[0], maps[1]]))
    1.0
    """
    flows = [
        [flow(*pair) for pair in itertools.pairwise(maps)] for maps in (stages, reference_stages)
    ]
    return sum(jnp.square(ours - theirs).mean() for ours, theirs in zip(*flows, strict=True))


def penalty(view: View):
    return view.options.weight * flow_distance(view.outputs.stages, view.taught)


METHOD = Method(
    penalty=penalty,
    teach=teach,
    options={'weight': non_negative(50.0, 'weight of the penalty', traced=True)},
    prepare=reference,
    needs_backbone=True,
)
