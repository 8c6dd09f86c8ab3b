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
from xmixup_jax.models.base import MOMENTUM, BatchNorm


class StochNorm(BatchNorm):
    """Batch normalisation with a random choice of statistics in training."""

    def __init__(self, *args, p: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.p = p
        self.key: Any = nnx.data(None)  # set for each step by `models.forward`

    def __call__(self, x):
        if self.use_running_average:
            return super().__call__(x)
        old = self.var[...]
        by_moving = super().__call__(x, use_running_average=True)
        by_batch = super().__call__(x, use_running_average=False)
        count = x.size // x.shape[-1] * jax.lax.axis_size(self.axis_name)
        step = self.var[...] - MOMENTUM * old  # (1 - MOMENTUM) times the biased variance
        self.var[...] = MOMENTUM * old + step * count / (count - 1)
        chosen = jax.random.bernoulli(self.key, self.p, (x.shape[-1],))
        return jnp.where(chosen, by_batch, by_moving)


METHOD = Method(
    options={'p': fraction(0.5, "probability that a channel takes the batch's statistics")},
    norm=lambda options: partial(StochNorm, p=options.p),
    needs_backbone=True,
)
