"""Penalises the smallest singular values of a batch's features, which transfer badly.

Chen, Wang, Fu, Long, Wang, "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral
Shrinkage for Safe Transfer Learning" (BSS), NeurIPS 2019,
https://proceedings.neurips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html:

    penalty = eta * sum of the k smallest squared singular values of the batch's features [B, D].

Value and coefficients are those of the authors' code (thuml/Batch-Spectral-Shrinkage).
"""

import jax
import jax.numpy as jnp

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import count, non_negative


def batch_spectral_shrinkage(features, k):
    """The sum of the k smallest squared singular values of [B, D].

    Differentiable, and finite, where singular values coincide: the values' derivative alone,
    unlike the vectors', has no difference of singular values in a denominator.

    >>> float(batch_spectral_shrinkage(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2))
    5.0
    """
    return jnp.sum(jnp.square(jnp.linalg.svd(features, compute_uv=False)[-k:]))


def penalty(view: View):
    features = jax.lax.all_gather(view.outputs.features, 'batch', tiled=True)
    return view.options.eta * batch_spectral_shrinkage(features, view.options.k)


METHOD = Method(
    penalty=penalty,
    options={
        'eta': non_negative(0.001, 'weight of the penalty', traced=True),
        'k': count(1, 'smallest singular values that are penalised'),
    },
    needs_backbone=True,
)
