"""StochNorm: batch normalisation that draws its statistics, channel by channel.

Kou, You, Long, Wang, "Stochastic Normalization", NeurIPS 2020: in training, each channel
is normalised by the moving statistics with probability 1 - p and by the batch's with probability
p. The moving ones begin as the pre-trained network's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.methods.base import Method
from xmixup_jax.models.base import BatchNorm


class StochNorm(BatchNorm):
    """Batch normalisation with a random choice of statistics in training."""

    def __init__(self, *args, p: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.p = p
        self.key = nnx.data(None)  # set for each step by `models.forward`

    def __call__(self, x):
        if self.use_running_average:
            return super().__call__(x)
        by_moving = super().__call__(x, use_running_average=True)
        by_batch = super().__call__(x, use_running_average=False)
        chosen = jax.random.bernoulli(self.key, self.p, (x.shape[-1],))
        return jnp.where(chosen, by_batch, by_moving)


METHOD = Method(
    defaults={'p': 0.5},
    norm=lambda config: partial(StochNorm, p=config.stochnorm.p),
)
