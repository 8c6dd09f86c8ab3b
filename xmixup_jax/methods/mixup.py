"""Mixes images and labels within the target.

Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
https://arxiv.org/abs/1710.09412: images and labels are mixed with those of another record of the
batch, lam ~ Beta(alpha, alpha).

As in the authors' code (facebookresearch/mixup-cifar10) one lam is drawn for each batch. The
paper's text leaves that open, and `lam` = 'sample' draws one for each record. The partner is the
record before in the shuffled batch; the authors permute the batch.
"""

from xmixup_jax import mixing
from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import choice, positive


def mix_with_neighbour(keys, batch, alpha, lam, reflect=False):
    """The batch mixed with itself: 'image', 'label', 'other_label' and 'lam' [B]."""
    weights = mixing.sample_lam(keys, alpha, reflect, lam)
    other = mixing.neighbour(batch)
    return {
        'image': mixing.mix_images(batch['image'], other['image'], weights),
        'label': batch['label'],
        'other_label': other['label'],
        'lam': weights,
    }


def transform(options, keys, batch):
    return mix_with_neighbour(keys, batch, options.alpha, options.lam)


def loss(view: View):
    batch = view.batch
    return mixing.two_label_cross_entropy(
        view.logits,
        batch['label'],
        batch['other_label'],
        batch['lam'],
        view.config.label_smoothing,
        view.class_weights,
    ).mean()


METHOD = Method(
    loss=loss,
    options={
        'alpha': positive(0.2, 'lam ~ Beta(alpha, alpha)', traced=True),
        'lam': choice('batch', mixing.LAM_DRAWS, 'one lam for each sample, or for each batch'),
    },
    transform=transform,
    changes_images=True,
)
