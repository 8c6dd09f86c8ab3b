"""XMixup: fine-tuning on target images mixed with images of matched source classes.

Li, Xiong, An, Xu, Dou, "XMixup: Efficient Transfer Learning with Auxiliary Samples by
Cross-domain Mixup", arXiv 2007.10252. One forward and one backward pass over as many images
as plain fine-tuning:

    x = lam * x_t + (1 - lam) * x_s,   lam ~ Beta(alpha, alpha),
    loss = mean of `mixing.mixed_cross_entropy(f(x), y_t, y_s, lam)`.
"""

from xmixup_jax import mixing
from xmixup_jax.methods.base import Method


def num_logits(config, num_classes, num_source_classes):
    if config.xmixup.label_space == 'target':
        return num_classes
    return num_classes + num_source_classes


def transform(config, keys, batch):
    lam = mixing.sample_lam(keys, config.xmixup.alpha, config.xmixup.reflect)
    return {
        'image': mixing.mix_images(batch['image'], batch['source_image'], lam),
        'label': batch['label'],
        'source_label': batch['source_label'],
        'lam': lam,
    }


def loss(config, num_classes, outputs, batch):
    return mixing.mixed_cross_entropy(
        outputs.logits,
        batch['label'],
        batch['source_label'],
        batch['lam'],
        config.xmixup.label_space,
        num_classes,
    ).mean()


METHOD = Method(uses_source=True, num_logits=num_logits, transform=transform, loss=loss)
