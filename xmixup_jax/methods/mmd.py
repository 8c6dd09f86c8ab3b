"""Penalises different distributions of the features in the two halves of a batch.

Gretton, Borgwardt, Rasch, Schölkopf, Smola, "A Kernel Two-Sample Test", JMLR 13, 2012,
https://jmlr.org/papers/v13/gretton12a.html: the squared maximum mean discrepancy, here between the
pooled features of the first and of the second half of the target's batch:

    penalty = weight * mean of (k(x, x') + k(y, y') - k(x, y') - k(y, x'))

over all pairs of places in the halves x and y, with k a sum of five Gaussians whose bandwidths are
1/4, 1/2, 1, 2 and 4 times the mean squared distance of two features. It is the `MMD` of
PaddleTransfer, the library of the XMixup authors' laboratory, with its weight; nothing is detached.
No source image takes part, and no paper describes this use.
"""

import jax
import jax.numpy as jnp

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import non_negative


def maximum_mean_discrepancy(features):
    """The squared maximum mean discrepancy between the halves of [B, D]; ignores an odd last row.

    >>> float(maximum_mean_discrepancy(jnp.ones((4, 3))))
    0.0
    """
    half = len(features) // 2
    features = features[: 2 * half]
    # Differences, not products: squares of large norms would cancel in float32.
    squared = jnp.square(features[:, None] - features).sum(axis=-1)
    bandwidth = squared.sum() / (4 * half**2 - 2 * half)
    bandwidth = jnp.where(bandwidth > 0, bandwidth, 1.0)
    kernel = sum(jnp.exp(-squared / (bandwidth * factor)) for factor in (0.25, 0.5, 1.0, 2.0, 4.0))
    sign = jnp.where(jnp.arange(2 * half) < half, 1.0, -1.0)
    return sign @ kernel @ sign / half**2


def penalty(view: View):
    features = jax.lax.all_gather(view.outputs.features, 'batch', tiled=True)
    return view.options.weight * maximum_mean_discrepancy(features)


METHOD = Method(
    penalty=penalty,
    options={'weight': non_negative(0.1, 'weight of the penalty', traced=True)},
    needs_backbone=True,
)
