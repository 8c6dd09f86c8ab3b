"""XMixup: fine-tuning on target images mixed with images of matched source classes.

Li, Xiong, An, Xu, Dou, "XMixup: Efficient Transfer Learning with Auxiliary Samples by
Cross-domain Mixup", arXiv 2007.10252. One forward and one backward pass over as many images
as plain fine-tuning:

    x = lam * x_t + (1 - lam) * x_s,   lam ~ Beta(alpha, alpha),
    loss = mean of `mixing.mixed_cross_entropy(f(x), y_t, y_s, lam)`.

With `mix_at` = k > 0 the feature maps at the end of the k-th stage are mixed instead (Verma et
al., "Manifold Mixup", ICML 2019): the stages before see both images, the others as many as plain
fine-tuning.
"""

import jax.numpy as jnp

from xmixup_jax import mixing
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Method, View


def extra_logits(config, sizes):
    return 0 if config.xmixup.label_space == 'target' else sizes.source


def transform(config, keys, batch):
    image, source_image = batch['image'], batch['source_image']
    lam = mixing.sample_lam(keys, config.xmixup.alpha, config.xmixup.reflect)
    if config.xmixup.mix_at:
        image = jnp.concatenate([image, source_image])
    else:
        image = mixing.mix_images(image, source_image, lam)
    return {
        'image': image,
        'label': batch['label'],
        'source_label': batch['source_label'],
        'lam': lam,
    }


def hook(view: View):
    """Mixes the two halves of what comes out of stage `mix_at`."""

    def mix(x, stage):
        if stage + 1 != view.config.xmixup.mix_at:
            return x
        return mixing.mix_images(*jnp.split(x, 2), view.batch['lam'])

    return mix


def loss(view: View):
    batch = view.batch
    if len(view.outputs.logits) != len(batch['label']):
        raise ConfigError(
            f'config.xmixup.mix_at={view.config.xmixup.mix_at} is beyond the last stage of '
            f'{view.config.model.name}: it has {len(view.outputs.stages)}'
        )
    return mixing.mixed_cross_entropy(
        view.outputs.logits,
        batch['label'],
        batch['source_label'],
        batch['lam'],
        view.config.xmixup.label_space,
        view.num_classes,
    ).mean()


METHOD = Method(
    loss=loss,
    defaults={
        'alpha': 0.2,  # lam ~ Beta(alpha, alpha); by the sweeps in benchmarks/RESULTS.md
        'reflect': True,  # lam >= 1/2: the target image dominates
        'label_space': 'joint',  # 'joint', 'separate', 'target'
        'mix_at': 0,  # the stage after which feature maps are mixed; 0: the images
    },
    transform=transform,
    hook=hook,
    pairs=True,
    extra_logits=extra_logits,
)
