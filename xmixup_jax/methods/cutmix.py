"""Replaces a box of each image by that of another record of the batch.

Yun, Han, Oh, Chun, Choe, Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with
Localizable Features", ICCV 2019, https://arxiv.org/abs/1905.04899. The labels are weighted by area.

As in the authors' code (clovaai/CutMix-PyTorch) a batch is changed with probability `prob` (0.5 for
CIFAR, 1 for ImageNet), and one box is drawn for all of it; `lam` = 'sample' draws a box for each
record. The partner is the record before in the shuffled batch; the authors permute the batch.
"""

import jax
import jax.numpy as jnp

from xmixup_jax import mixing
from xmixup_jax.methods import mixup
from xmixup_jax.methods.base import Method
from xmixup_jax.methods.options import choice, fraction, positive


def box_mask(lam, centre, size):
    """A box of relative area 1 - lam around a centre, cut off at the border.

    Args:
      lam: scalar.
      centre: int32 [2], row and column.
      size: side of the image in px.

    Returns:
      bool [size, size], True inside. The sides of the box are rounded down, and so are their
      halves, as in the authors' code.

    >>> mask = box_mask(0.75, jnp.array([4, 4]), 8)
    >>> mask.shape, int(mask.sum())
    ((8, 8), 16)
    """
    # The tiny term keeps sides that are whole numbers from being rounded down by float32.
    side = jnp.floor(size * jnp.sqrt(1.0 - lam) + 1e-4).astype(jnp.int32)
    low = jnp.clip(centre - side // 2, 0, size)
    high = jnp.clip(centre + side // 2, 0, size)
    place = jnp.arange(size)[:, None]
    inside = (place >= low) & (place < high)
    return inside[:, None, 0] & inside[None, :, 1]


def transform(options, keys, batch):
    size = batch['image'].shape[1]
    keys_lam, keys_centre, keys_cut = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(
        keys
    )
    lam = mixing.sample_lam(keys_lam, options.alpha, reflect=False)
    centre = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, size))(keys_centre)
    if options.lam == 'batch':
        lam, centre = mixing.broadcast_first(lam), mixing.broadcast_first(centre)
    cut = mixing.broadcast_first(jax.vmap(jax.random.uniform)(keys_cut)) < options.prob
    masks = jax.vmap(box_mask, (0, 0, None))(lam, centre, size) & cut[:, None, None]
    other = mixing.neighbour(batch)
    return {
        'image': jnp.where(masks[..., None], other['image'], batch['image']),
        'label': batch['label'],
        'other_label': other['label'],
        'lam': 1.0 - masks.mean(axis=(1, 2)),
    }


METHOD = Method(
    loss=mixup.loss,
    options={
        'alpha': positive(
            1.0, 'lam ~ Beta(alpha, alpha); a box covers 1 - lam of an image', traced=True
        ),
        'prob': fraction(0.5, 'probability that a batch is changed', traced=True),
        'lam': choice('batch', mixing.LAM_DRAWS, 'one box for each sample, or for each batch'),
    },
    transform=transform,
    changes_images=True,
)
