"""Trains on target images and matched source images at once, with a head for each.

Ge, Yu, "Borrowing Treasures from the Wealthy: Deep Transfer Learning through Selective Joint
Fine-Tuning" (Co-Train), CVPR 2017, https://arxiv.org/abs/1702.08690. One backbone, two heads, and
gradients of both batches:

    loss = target_weight * CE(f_t(x_t), y_t) + weight * CE(f_s(x_s), y_s).

Both weights are 0.5, and a batch has as many source as target images, as in the public prototxt
(ZYYSny/Selective-Joint-Fine-tuning). Two departures: the source images come from the matched
classes (config.match), where the paper retrieves them one by one by histograms of low-level filter
responses; and the source's head has the matched classes alone, where the paper's has all 1,000.
"""

import jax.numpy as jnp
import optax

from xmixup_jax.methods.base import Method, View, cross_entropy
from xmixup_jax.methods.options import non_negative


def transform(options, keys, batch):
    del options, keys
    image = jnp.concatenate([batch['image'], batch['source_image']])
    return {'image': image, 'label': batch['label'], 'source_label': batch['source_label']}


def loss(view: View):
    source_label = view.batch['source_label']
    source_logits = view.extra_logits[-len(source_label) :]
    source_loss = optax.softmax_cross_entropy_with_integer_labels(source_logits, source_label)
    options = view.options
    return options.target_weight * cross_entropy(view) + options.weight * source_loss.mean()


METHOD = Method(
    loss=loss,
    options={
        'target_weight': non_negative(0.5, "weight of the target's cross-entropy", traced=True),
        'weight': non_negative(0.5, "weight of the source's cross-entropy", traced=True),
    },
    transform=transform,
    pairs=True,
    changes_images=True,
    extra_logits=lambda options, sizes: sizes.source,
    needs_backbone=True,
)
