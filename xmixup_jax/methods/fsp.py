"""FSP: the flow between feature maps, held close to the reference network's.

Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning", CVPR 2017, eq. 1 and 2. The flow of a stage is the Gram matrix between the
maps F [h, w, C] that enter it and the maps F' [h, w, C'] that leave it,

    G_ij = sum over positions of F_i F'_j / (h w),    penalty = weight * mean of (G - G0)^2

summed over the second to the last stage. The larger map is average-pooled to the smaller one's
size. The paper gives no coefficient for the sum with a cross-entropy; the mean over the matrix
and the weight 50 are those of the benchmark of Tian, Krishnan, Isola (CRD, ICLR 2020).
"""

import itertools

import jax.numpy as jnp
from flax import nnx

from xmixup_jax.methods import delta
from xmixup_jax.methods.base import Method, View, reference


def _halved(maps):
    return nnx.avg_pool(maps, (2, 2), (2, 2), 'SAME', count_include_pad=False)


def flow(before, after):
    """The Gram matrix [B, C, C'] between the maps [B, h, w, C] and [B, h', w', C'] of a stage."""
    while before.shape[1] != after.shape[1]:
        if before.shape[1] > after.shape[1]:
            before = _halved(before)
        else:  # maps that are not padded do not come down to exactly a half
            after = _halved(after)
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
    return view.config.fsp.weight * flow_distance(view.outputs.stages, view.taught)


METHOD = Method(penalty=penalty, teach=delta.teach, defaults={'weight': 50.0}, prepare=reference)
