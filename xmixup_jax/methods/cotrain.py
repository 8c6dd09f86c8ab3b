"""Co-Train: joint training on target samples and retrieved source samples.

Ge & Yu, "Borrowing Treasures from the Wealthy: Deep Transfer Learning through Selective Joint
Fine-Tuning", CVPR 2017. One backbone, two heads, both batches backpropagated:

    loss = CE(f_t(x_t), y_t) + weight * CE(f_s(x_s), y_s).

The source samples come from the matched classes (config.match), as many as target samples; the
paper retrieves them image by image, by histograms of low-level filter responses.
"""

import jax.numpy as jnp
import optax

from xmixup_jax.methods.base import Method, View, cross_entropy


def transform(config, keys, batch):
    del config, keys
    image = jnp.concatenate([batch['image'], batch['source_image']])
    return {'image': image, 'label': batch['label'], 'source_label': batch['source_label']}


def loss(view: View):
    source_label = view.batch['source_label']
    source_logits = view.extra_logits[-len(source_label) :]
    source_loss = optax.softmax_cross_entropy_with_integer_labels(source_logits, source_label)
    return cross_entropy(view) + view.config.cotrain.weight * source_loss.mean()


METHOD = Method(
    loss=loss,
    defaults={'weight': 1.0},
    transform=transform,
    pairs=True,
    extra_logits=lambda config, sizes: sizes.source,
)
