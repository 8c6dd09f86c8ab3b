"""Normalises each channel by the batch's or by the moving statistics, at random.

Kou, You, Long, Wang, "Stochastic Normalization" (StochNorm), NeurIPS 2020,
https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html. In
training each channel uses the moving statistics with probability 1 - p and the batch's with
probability p. The moving ones begin as the pre-trained network's. As in the authors' code
(thuml/StochNorm) every channel's moving statistics follow the batch's, whatever is drawn, with the
unbiased variance.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.methods.base import Method
from xmixup_jax.methods.options import fraction
from xmixup_jax.models.normalization import AXIS, BatchNorm


class StochNorm(BatchNorm):
    """Batch normalisation with a random choice of statistics in training."""

    def __init__(self, *args, p: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.p = p
        self.key: Any = nnx.data(None)  # set for each step by `models.forward`

    def weight(self):
        return jax.random.bernoulli(self.key, self.p, (self.num_features,)).astype(jnp.float32)

    def moved(self, stored, batch, count):
        count *= len(self.groups[0]) if self.groups else jax.lax.axis_size(AXIS)
        return super().moved(stored, batch._replace(var=batch.var * count / (count - 1)), count)


METHOD = Method(
    options={'p': fraction(0.5, "probability that a channel takes the batch's statistics")},
    norm=lambda options: partial(StochNorm, p=options.p),
    needs_backbone=True,
)
