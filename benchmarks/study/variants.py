"""`xmixup_variant`: XMixup with what might make it better, an option for each.

The study's processes add it to the registry. With every option at its default it is `xmixup` of
images with joint labels.
"""

import jax
import jax.numpy as jnp
import optax

from xmixup_jax import mixing
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import cotuning, cutmix, lwf
from xmixup_jax.methods.base import (
    Method,
    Prepared,
    Setup,
    View,
    pretrained_columns,
    reference,
    with_linear_head,
    with_pretrained_head,
)


def two_heads(config) -> bool:
    """Whether the pre-trained head is kept whole, beside the target's."""
    return config.xmixup_variant.source_label in ('translated', 'distilled')


def extra_logits(config, sizes):
    return pretrained_columns(config, sizes) if two_heads(config) else sizes.source


def transform(config, keys, batch):
    options = config.xmixup_variant
    keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    lam = mixing.sample_lam(keys[0], options.alpha, reflect=True)
    mixed = jax.vmap(jax.random.uniform)(keys[1]) < options.share
    mixed &= batch['progress'] < options.until
    lam = jnp.where(mixed, lam, 1.0)
    image, source_image = batch['image'], batch['source_image']
    if options.cut:
        boxes = jax.vmap(cutmix.box_mask, (0, 0, None))(keys[2], lam, image.shape[1])
        image = jnp.where(boxes[..., None], source_image, image)
        lam = 1.0 - boxes.mean(axis=(1, 2))
    else:
        image = mixing.mix_images(image, source_image, lam)
    kept = {key: batch[key] for key in ('label', 'source_label')}
    return kept | {'image': image, 'lam': lam}


def teach(view: View):
    if view.config.xmixup_variant.source_label != 'distilled':
        return None
    constants = view.constants
    outputs = view.network(constants['params'], constants['batch_stats'], view.batch['image'])
    return outputs.logits[:, view.num_classes :]


def loss(view: View):
    options, batch = view.config.xmixup_variant, view.batch
    label, source_label, lam = batch['label'], batch['source_label'], batch['lam']
    if not two_heads(view.config):
        logits = view.outputs.logits / options.temperature
        arguments = (logits, label, source_label, lam, 'joint', view.num_classes)
        return mixing.mixed_cross_entropy(*arguments).mean()
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(view.logits, label)
    if options.source_label == 'distilled':
        source_loss = lwf.distillation(view.extra_logits, view.taught, temperature=2.0)
    else:
        # Co-Tuning's label for the target's part of the image, its own for the source's part.
        translated = view.constants['relationship'][label]
        own = jax.nn.one_hot(view.constants['selected'][source_label], translated.shape[1])
        soft = lam[:, None] * translated + (1.0 - lam[:, None]) * own
        source_loss = optax.softmax_cross_entropy(view.extra_logits, soft).mean()
    return (lam * cross_entropy).mean() + options.weight * source_loss


def prepare(setup: Setup) -> Prepared:
    options, selected = setup.config.xmixup_variant, setup.match.selected
    if options.warm_target:
        setup = setup._replace(state=with_linear_head(setup))
    state, constants = setup.state, {}
    if options.source_label == 'translated':
        state, constants = cotuning.prepare(setup)
        constants |= {'selected': selected}
    elif options.source_label == 'distilled':
        state, constants = reference(setup._replace(state=with_pretrained_head(setup)))
    elif options.source_label != 'own':
        raise ConfigError(
            f'config.xmixup_variant.source_label={options.source_label}: it must be own, '
            'translated or distilled'
        )
    if options.warm_source and not two_heads(setup.config):
        head = {key: values[..., selected] for key, values in setup.head.items()}
        state = with_pretrained_head(setup._replace(state=state, head=head))
    return Prepared(state, constants)


NAME = 'xmixup_variant'
METHOD = Method(
    loss=loss,
    defaults={
        'alpha': 0.2,
        'share': 1.0,  # of the images are mixed,
        'until': 1.0,  # in this first share of the steps
        'cut': False,  # paste a box instead of mixing (CutMix)
        'temperature': 1.0,  # of the joint head
        'warm_source': False,  # the source's columns begin as those of the pre-trained head
        'warm_target': False,  # config.warm_head
        # 'own': as in XMixup. With the whole pre-trained head as a second one, 'translated' as in
        # Co-Tuning, or 'distilled' as in LWF, of the mixed image.
        'source_label': 'own',
        'weight': 1.0,  # of that second head's loss
    },
    transform=transform,
    pairs=True,
    teach=teach,
    extra_logits=extra_logits,
    reads_source=lambda config: True,
    prepare=prepare,
)
