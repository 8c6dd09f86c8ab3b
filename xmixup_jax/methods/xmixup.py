"""XMixup: fine-tuning on target images mixed with images of matched source classes.

Li, Xiong, An, Xu, Dou, "XMixup: Efficient Transfer Learning with Auxiliary Samples by
Cross-domain Mixup", arXiv 2007.10252. One forward and one backward pass over as many images
as plain fine-tuning:

    x = lam * x_t + (1 - lam) * x_s,   lam ~ Beta(alpha, alpha),
    loss = mean of `mixing.mixed_cross_entropy(f(x), y_t, y_s, lam)`.
"""

from xmixup_jax import mixing
from xmixup_jax.methods.base import Method, View


def extra_logits(config, sizes):
    return 0 if config.xmixup.label_space == 'target' else sizes.source


def transform(config, keys, batch):
    image, lam = mixing.cross_domain_mixup(
        keys, batch['image'], batch['source_image'], config.xmixup.alpha, config.xmixup.reflect
    )
    return {
        'image': image,
        'label': batch['label'],
        'source_label': batch['source_label'],
        'lam': lam,
    }


def loss(view: View):
    batch = view.batch
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
    },
    transform=transform,
    pairs=True,
    extra_logits=extra_logits,
)
