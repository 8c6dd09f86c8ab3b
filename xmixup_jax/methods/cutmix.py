"""CutMix: a box of each image is replaced by that of another record of the batch.

Yun, Han, Oh, Chun, Choe, Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with
Localizable Features", ICCV 2019. The labels are weighted by area.
"""

import jax
import jax.numpy as jnp

from xmixup_jax import mixing
from xmixup_jax.methods import mixup
from xmixup_jax.methods.base import Method


def box_mask(key, lam, size):
    """A box of relative area 1 - lam around a random centre, cut off at the border.

    Returns:
      bool [size, size], True inside.

    >>> mask = box_mask(jax.random.key(0), 0.75, 8)
    >>> mask.shape, bool(0 < mask.mean() <= 0.25)
    ((8, 8), True)
    """
    side = size * jnp.sqrt(1.0 - lam)
    centre = jax.random.uniform(key, (2,), maxval=size)
    low = jnp.round(jnp.clip(centre - side / 2, 0, size))
    high = jnp.round(jnp.clip(centre + side / 2, 0, size))
    place = jnp.arange(size)[:, None]
    inside = (place >= low) & (place < high)
    return inside[:, None, 0] & inside[None, :, 1]


def transform(config, keys, batch):
    keys_lam, keys_box = jax.vmap(jax.random.split, out_axes=1)(keys)
    lam = mixing.sample_lam(keys_lam, config.cutmix.alpha, reflect=False)
    size = batch['image'].shape[1]
    masks = jax.vmap(box_mask, (0, 0, None))(keys_box, lam, size)
    other = mixing.neighbour(batch)
    return {
        'image': jnp.where(masks[..., None], other['image'], batch['image']),
        'label': batch['label'],
        'other_label': other['label'],
        'lam': 1.0 - masks.mean(axis=(1, 2)),
    }


METHOD = Method(loss=mixup.loss, defaults={'alpha': 1.0}, transform=transform)
