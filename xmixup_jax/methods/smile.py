"""Mixes images, and teaches with a mean teacher's mixed features and probabilities.

Li, Xiong, Xu, Dou, "SMILE: Self-Distilled Mixup for Efficient Transfer Learning", 2021,
https://arxiv.org/abs/2103.13941. With x~ = lam x_a + (1 - lam) x_b, the teacher's last feature maps
F' and its pre-trained head's probabilities p' of the unmixed images,

    loss = mixup's loss
           + feature_weight * ||F(x~) - (lam F'(x_a) + (1 - lam) F'(x_b))|| / (h w)
           + source_weight * CE(softmax(z_s(x~)), lam p'(x_a) + (1 - lam) p'(x_b)),

the norm over the whole batch. The teacher begins as the pre-trained network. In every 10th
iteration, the first included, its backbone moves a thousandth of the way to the student's as it
was before the step; its head and its batch statistics stay. One lam >= 1/2 is drawn for a batch.

Form and coefficients are those of the authors' code (lixingjian/SMILE). There the partner comes
from a permutation of the batch; here it is the record before in the shuffled batch.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from xmixup_jax import mixing
from xmixup_jax.methods import mixup
from xmixup_jax.methods.base import Method, Prepared, Setup, View
from xmixup_jax.methods.options import count, fraction, non_negative, positive
from xmixup_jax.methods.parts import always, pretrained_columns, with_pretrained_head
from xmixup_jax.optimizer import HEAD


def transform(options, keys, batch):
    mixed = mixup.mix_with_neighbour(keys, batch, options.alpha, 'batch', reflect=True)
    return mixed | {'unmixed': batch['image']}


def teach(view: View):
    outputs = view.network(
        view.memory['params'], view.constants['batch_stats'], view.batch['unmixed']
    )
    probabilities = jax.nn.softmax(outputs.logits[:, view.num_classes :])
    own = {'maps': outputs.stages[-1], 'probabilities': probabilities}
    lam = view.batch['lam']

    def mix(mine, other):
        weight = lam.reshape(-1, *[1] * (mine.ndim - 1))
        return weight * mine + (1.0 - weight) * other

    return jax.tree.map(mix, own, mixing.neighbour(own))


def feature_distance(maps, mixed_maps):
    """||F - F'|| / (h w), the norm over all of [B, h, w, C] on all devices."""
    square = jax.lax.psum(jnp.sum(jnp.square(maps - mixed_maps)), 'batch')
    # The tiny term keeps the derivative finite where both agree.
    return jnp.sqrt(square + 1e-12) / (maps.shape[1] * maps.shape[2])


def loss(view: View):
    options, taught = view.options, view.taught
    distance = feature_distance(view.outputs.stages[-1], taught['maps'])
    source_loss = optax.softmax_cross_entropy(view.extra_logits, taught['probabilities']).mean()
    return (
        mixup.loss(view) + options.feature_weight * distance + options.source_weight * source_loss
    )


def after_step(view: View, state):
    options, teacher = view.options, state.memory['params']
    due = (state.step - 1) % options.every == 0
    # view.params are those before the step.
    followed = optax.incremental_update(
        view.params, teacher, jnp.where(due, 1.0 - options.momentum, 0.0)
    )
    return replace(state, memory={'params': followed | {HEAD: teacher[HEAD]}})


def prepare(setup: Setup) -> Prepared:
    state = with_pretrained_head(setup)
    state = replace(state, memory={'params': state.params})
    return Prepared(state, {'batch_stats': state.batch_stats})


METHOD = Method(
    loss=loss,
    options={
        'alpha': positive(0.2, 'lam ~ Beta(alpha, alpha), reflected to lam >= 1/2', traced=True),
        'feature_weight': non_negative(0.01, "weight of the feature maps' distance", traced=True),
        'source_weight': non_negative(
            0.1, "weight of the pre-trained head's cross-entropy", traced=True
        ),
        'momentum': fraction(0.999, 'share of the teacher that a move keeps', traced=True),
        'every': count(10, 'steps between two moves of the teacher'),
    },
    transform=transform,
    changes_images=True,
    teach=teach,
    after_step=after_step,
    extra_logits=pretrained_columns,
    needs_head=always,
    prepare=prepare,
    needs_backbone=True,
)
