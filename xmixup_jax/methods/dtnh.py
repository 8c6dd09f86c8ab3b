"""Removes from L2-SP's gradient whatever opposes the cross-entropy's.

Wan, Xiong, Li, Zhu, Huan, "Towards Making Deep Transfer Learning Never Hurt" (DTNH), ICDM 2019,
https://arxiv.org/abs/1911.07489. The direction that is followed descends in the cross-entropy at
least as steeply as the cross-entropy's own gradient. No code is public.
"""

import jax.numpy as jnp
import optax

from xmixup_jax.methods import l2sp
from xmixup_jax.methods.base import Method
from xmixup_jax.methods.parts import reference, without_weight_decay


def combine_gradients(loss_grads, penalty_grads):
    """g + r - min(0, <r, g>) / ||g||^2 * g, for the gradients g of the loss and r of the penalty.

    Its inner product with g is ||g||^2 + max(0, <r, g>) >= 0.

    >>> g, r = {'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([-3.0, 2.0])}
    >>> combine_gradients(g, r)['w'].tolist()
    [1.0, 2.0]
    """
    square = optax.tree.norm(loss_grads, squared=True)
    inner = optax.tree.vdot(penalty_grads, loss_grads)
    opposing = jnp.minimum(inner, 0.0) / jnp.where(square > 0, square, 1.0)
    return optax.tree.add(penalty_grads, optax.tree.scale(1.0 - opposing, loss_grads))


METHOD = Method(
    penalty=l2sp.penalty,
    combine=combine_gradients,
    options=l2sp.METHOD.options,
    prepare=reference,
    optimizer=without_weight_decay,
    needs_backbone=True,
)
