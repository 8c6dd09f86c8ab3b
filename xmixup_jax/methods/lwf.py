"""Distils the pre-trained head's predictions on the target's images.

Li, Hoiem, "Learning without Forgetting" (LWF), ECCV 2016, https://arxiv.org/abs/1606.09282. The
network keeps the pre-trained head beside the new one. With the pre-trained network's outputs z0

    loss = CE(z_t, y) + weight * CE(softmax(z_s / T), softmax(z0 / T)).

Weight 1 and T = 2 are the paper's. TLlib has weight 4 and T = 3 without the factor T^2, and keeps
the pre-trained head as it is. The teacher sees the same crop as the network; paper and TLlib
record its outputs once, TLlib on one random crop of each image. The paper first trains the new head
alone; config.warm_head=True is the nearest to that here.
"""

import jax
import optax

from xmixup_jax.methods.base import Method, Prepared, Setup, View, cross_entropy
from xmixup_jax.methods.options import non_negative, positive
from xmixup_jax.methods.parts import (
    always,
    pretrained_columns,
    reference,
    reference_outputs,
    with_pretrained_head,
)


def teach(view: View):
    return reference_outputs(view).logits[:, view.num_classes :]


def distillation(logits, teacher_logits, temperature):
    """Mean cross-entropy between the two distributions, both softened by the temperature.

    Args:
      logits, teacher_logits: float [B, K].
      temperature: > 0.

    >>> from jax import numpy as jnp
    >>> round(float(distillation(jnp.zeros((5, 2)), jnp.ones((5, 2)), 2.0) / jnp.log(2)), 4)
    1.0
    """
    soft = jax.nn.softmax(teacher_logits / temperature)
    return optax.softmax_cross_entropy(logits / temperature, soft).mean()


def loss(view: View):
    options = view.options
    kept = distillation(view.extra_logits, view.taught, options.temperature)
    return cross_entropy(view) + options.weight * kept


def prepare(setup: Setup) -> Prepared:
    return reference(setup._replace(state=with_pretrained_head(setup)))


METHOD = Method(
    loss=loss,
    options={
        'weight': non_negative(1.0, 'weight of the distillation', traced=True),
        'temperature': positive(2.0, 'softens both distributions', traced=True),
    },
    teach=teach,
    extra_logits=pretrained_columns,
    needs_head=always,
    prepare=prepare,
    needs_backbone=True,
)
