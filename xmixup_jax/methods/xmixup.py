"""Fine-tunes on target images mixed with images of matched source classes.

Li, Xiong, An, Xu, Dou, "XMixup: Efficient Transfer Learning with Auxiliary Samples by
Cross-domain Mixup", 2020, https://arxiv.org/abs/2007.10252. Each step makes one forward and one
backward pass over the same number of images as plain fine-tuning:

    x = lam * x_t + (1 - lam) * x_s,   lam ~ Beta(alpha, alpha),
    loss = mean of `mixing.mixed_cross_entropy(f(x), y_t, y_s, lam)`.

With `mix_at` = k > 0 the feature maps at the end of the k-th stage are mixed instead (Verma et
al., "Manifold Mixup", ICML 2019, https://arxiv.org/abs/1806.05236): the stages before see both
images, the others as many as plain fine-tuning. No code is public; the law of lam, the label space
and the coefficients are this project's choices.
"""

import jax.numpy as jnp

from xmixup_jax import mixing
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Method, Prepared, Setup, View, unprepared
from xmixup_jax.methods.options import choice, count, flag, positive
from xmixup_jax.methods.parts import with_pretrained_head


def extra_logits(options, sizes):
    return 0 if options.label_space == 'target' else sizes.source


def transform(options, keys, batch):
    image, source_image = batch['image'], batch['source_image']
    lam = mixing.sample_lam(keys, options.alpha, options.reflect, options.lam)
    if options.mix_at:
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
    """Mixes the two halves of the output of stage `mix_at`."""

    def mix(x, stage, place):
        if (stage + 1, place) != (view.options.mix_at, 'end'):
            return x
        target, source = jnp.split(x, 2)
        return mixing.mix_images(target, source, view.batch['lam'])

    return mix


def loss(view: View):
    batch = view.batch
    if len(view.outputs.logits) != len(batch['label']):
        raise ConfigError(
            f'config.{view.name}.mix_at={view.options.mix_at} is beyond the last stage of '
            f'{view.config.model.name}: it has {len(view.outputs.stages)}'
        )
    return mixing.mixed_cross_entropy(
        view.outputs.logits,
        batch['label'],
        batch['source_label'],
        batch['lam'],
        view.options.label_space,
        view.num_classes,
        view.config.label_smoothing,
        view.class_weights,
    ).mean()


def needs_head(options):
    return options.source_head == 'pretrained' and options.label_space != 'target'


def prepare(setup: Setup) -> Prepared:
    if not needs_head(setup.options):
        return unprepared(setup)
    assert setup.head is not None  # as `needs_head` demands
    columns = setup.source_columns()
    head = {name: leaf[..., columns] for name, leaf in setup.head.items()}
    return Prepared(with_pretrained_head(setup._replace(head=head)), {})


METHOD = Method(
    loss=loss,
    options={
        # By the sweeps in benchmarks/RESULTS.md.
        'alpha': positive(0.2, 'lam ~ Beta(alpha, alpha)', traced=True),
        'lam': choice('sample', mixing.LAM_DRAWS, 'one lam for each sample, or for each batch'),
        'reflect': flag(True, 'lam >= 1/2: the target image dominates'),
        'label_space': choice(
            'joint',
            mixing.LABEL_SPACES,
            'one softmax over target and source classes, one for each, or the target label alone',
        ),
        'source_head': choice(
            'random',
            ('random', 'pretrained'),
            "how the head's source columns begin; pretrained ones need optimizer.clip_norm=1",
        ),
        'mix_at': count(0, 'stage after which feature maps are mixed; 0: the images', 0),
    },
    transform=transform,
    hook=hook,
    pairs=True,
    changes_images=True,
    extra_logits=extra_logits,
    needs_head=needs_head,
    prepare=prepare,
)
