"""Mixup within the target.

Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018:
images and labels are mixed with those of another record of the batch, lam ~ Beta(alpha, alpha).
"""

from xmixup_jax import mixing
from xmixup_jax.methods.base import Method, View


def mix_with_neighbour(keys, batch, alpha):
    """The batch mixed with itself: 'image', 'label', 'other_label' and 'lam' [B]."""
    lam = mixing.sample_lam(keys, alpha, reflect=False)
    other = mixing.neighbour(batch)
    return {
        'image': mixing.mix_images(batch['image'], other['image'], lam),
        'label': batch['label'],
        'other_label': other['label'],
        'lam': lam,
    }


def transform(config, keys, batch):
    return mix_with_neighbour(keys, batch, config.mixup.alpha)


def loss(view: View):
    batch = view.batch
    return mixing.two_label_cross_entropy(
        view.logits, batch['label'], batch['other_label'], batch['lam']
    ).mean()


METHOD = Method(loss=loss, defaults={'alpha': 0.2}, transform=transform)
