"""RandAugment, TrivialAugment, colour jitter and random erasing, on the device.

Each image has its own key. The operations, their magnitudes and defaults are torchvision's, on
uint8 images, with nearest neighbours and black where an image is moved out of itself.

Under `vmap` a choice among operations computes all of them. So those that move pixels share one
gather, and on a CPU, where the others would cost most, the images are taken one by one.

References:
  Cubuk, Zoph, Shlens, Le, "RandAugment", CVPR workshops 2020, https://arxiv.org/abs/1909.13719
  Müller and Hutter, "TrivialAugment", ICCV 2021, https://arxiv.org/abs/2103.10158
  Zhong, Zheng, Kang, Li, Yang, "Random Erasing Data Augmentation", AAAI 2020,
    https://arxiv.org/abs/1708.04896
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

BINS = 31
"""Magnitudes of an operation, from none to the largest."""
OPERATIONS = (
    'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'brightness', 'color',
    'contrast', 'sharpness', 'posterize', 'solarize', 'autocontrast', 'equalize',
)  # fmt: skip
_SIGNED = OPERATIONS[1:10]
_GREY = (0.2989, 0.587, 0.114)
# Of random erasing: the share of the area and the height over the width.
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)


def augmented(options: ConfigDict, keys: jax.Array, images: jax.Array) -> jax.Array:
    """Augments images by the policy, then by colour jitter.

    Args:
      options: config.augment.
      keys: random keys, [B], one for each image.
      images: [B, S, S, 3], 0 to 255, uint8 or float32, which is rounded.

    Returns:
      float32 [B, S, S, 3], whole numbers from 0 to 255.
    """
    images = jnp.round(images.astype(jnp.float32))
    key_policy, key_jitter = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if options.policy:

        def by_policy(key, image):
            drawn = draw(key, options, image.shape[0])
            return jax.lax.scan(lambda now, each: (apply(now, *each), None), image, drawn)[0]

        if jax.default_backend() == 'cpu':  # each image computes the operation drawn alone
            images = jax.lax.map(lambda each: by_policy(*each), (key_policy, images))
        else:
            images = jax.vmap(by_policy)(key_policy, images)
    if options.color_jitter:
        drawn = jax.vmap(partial(draw_jitter, strength=options.color_jitter))(key_jitter)
        images = jax.vmap(jitter)(images, *drawn)
    return images


def magnitudes(policy: str, side: int) -> np.ndarray:
    """The magnitudes of each operation, without their sign.

    Args:
      policy: 'randaugment' or 'trivialaugment'.
      side: of the images in px.

    Returns:
      float32 [operations, BINS].
    """
    wide = policy == 'trivialaugment'
    steps = np.linspace(0, 1, BINS)
    largest = dict.fromkeys(('shear_x', 'shear_y'), 0.99 if wide else 0.3)
    shift = 32.0 if wide else 150 / 331 * side
    largest |= dict.fromkeys(('translate_x', 'translate_y'), shift)
    largest['rotate'] = 135.0 if wide else 30.0
    largest |= dict.fromkeys(
        ('brightness', 'color', 'contrast', 'sharpness'), 0.99 if wide else 0.9
    )
    table = {name: steps * largest.get(name, 0.0) for name in OPERATIONS}
    table['posterize'] = 8 - np.round(steps * (6 if wide else 4))
    table['solarize'] = 255 * (1 - steps)
    for name in ('translate_x', 'translate_y'):
        table[name] = np.floor(table[name])
    return np.array([table[name] for name in OPERATIONS], np.float32)


def draw(key: jax.Array, options: ConfigDict, side: int) -> tuple[jax.Array, jax.Array]:
    """Draws the operations of one image, as torchvision's policies do.

    Returns:
      (operations, magnitudes): int32 positions in `OPERATIONS`, and float32, [n] each.
    """
    key_operation, key_bin, key_sign = jax.random.split(key, 3)
    n = options.num_ops if options.policy == 'randaugment' else 1
    operations = jax.random.randint(key_operation, (n,), 0, len(OPERATIONS))
    bins = jnp.full(n, options.magnitude)
    if options.policy == 'trivialaugment':
        bins = jax.random.randint(key_bin, (n,), 0, BINS)
    signed = jnp.array([name in _SIGNED for name in OPERATIONS])[operations]
    signs = jnp.where(signed & jax.random.bernoulli(key_sign, shape=(n,)), -1, 1)
    return operations, signs * jnp.asarray(magnitudes(options.policy, side))[operations, bins]


def apply(image: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Applies one operation to one image.

    Args:
      image: float32 [S, S, 3], whole numbers from 0 to 255.
      operation: int32 scalar, a position in `OPERATIONS`.
      magnitude: float32 scalar, with its sign, see `draw`.

    Returns:
      like the image.
    """
    step = jnp.exp2(8 - magnitude)
    recoloured = {
        'brightness': lambda: _blend(image, jnp.zeros(()), 1 + magnitude),
        'color': lambda: _blend(image, _grey(image), 1 + magnitude),
        'contrast': lambda: _blend(image, _grey(image).mean(), 1 + magnitude),
        'sharpness': lambda: _blend(image, _blurred(image), 1 + magnitude),
        'posterize': lambda: jnp.floor(image / step) * step,
        'solarize': lambda: jnp.where(image >= magnitude, 255 - image, image),
        'autocontrast': lambda: _stretched(image),
        'equalize': lambda: _equalized(image),
    }
    # The others move pixels, and share one branch.
    branches = [lambda: _warped(image, operation, magnitude), *recoloured.values()]
    names = ['', *recoloured]
    branch = [names.index(name) if name in names else 0 for name in OPERATIONS]
    return jax.lax.switch(jnp.array(branch)[operation], branches)


def _warped(image: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Sheared about the corner, translated, or rotated counter-clockwise about the middle."""
    shear_x, shear_y, shift_x, shift_y, angle = (
        jnp.where(operation == OPERATIONS.index(name), magnitude, 0)
        for name in ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')
    )
    side = image.shape[0]
    corner, middle = side / 2, (side - 1) / 2
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    # Where in the image each pixel comes from.
    x, y = jnp.meshgrid(*2 * [jnp.arange(side) - middle])
    from_x = cos * x - sin * y + shear_x * (y + corner) - shift_x + middle
    from_y = sin * x + cos * y + shear_y * (x + corner) - shift_y + middle
    column, row = jnp.round(from_x).astype(jnp.int32), jnp.round(from_y).astype(jnp.int32)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    place = jnp.where(inside, row * side + column, 0)
    return jnp.where(inside[..., None], image.reshape(-1, 3)[place], 0)


def _grey(image: jax.Array) -> jax.Array:
    """[S, S, 1], whole numbers."""
    red, green, blue = (image[..., i : i + 1] * weight for i, weight in enumerate(_GREY))
    return jnp.floor(red + green + blue)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """As Pillow does, so that values that both images share are exact."""
    return jnp.floor(jnp.clip(other + factor * (image - other), 0, 255))


def _blurred(image: jax.Array) -> jax.Array:
    """The mean of each pixel, five times, and its eight neighbours; the border as it is."""
    total = jax.lax.reduce_window(image, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), 'SAME')
    place = jnp.arange(image.shape[0])
    inner = (place > 0) & (place < image.shape[0] - 1)
    return jnp.where(
        (inner[:, None] & inner)[..., None], jnp.round((total + 4 * image) / 13), image
    )


def _stretched(image: jax.Array) -> jax.Array:
    """Each channel from 0 to 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = jnp.floor((image - low) * (255 / jnp.maximum(high - low, 1)))
    return jnp.where(high > low, stretched, image)


def _equalized(image: jax.Array) -> jax.Array:
    """Each channel with about as many pixels of every value."""
    values = image.astype(jnp.int32)

    def one(channel):
        counts = jnp.bincount(channel.reshape(-1), length=256)
        # Of all pixels but those of the largest value.
        step = (channel.size - counts[channel.max()]) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table, jnp.arange(256))[channel]

    return jax.vmap(one, 2, 2)(values).astype(image.dtype)


def draw_jitter(key: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Draws the colour jitter of one image, as torchvision's ColorJitter does.

    Returns:
      (order, factors): a permutation of brightness, contrast and saturation; float32 [3] in
      [1 - strength, 1 + strength].
    """
    key_order, key_factors = jax.random.split(key)
    factors = jax.random.uniform(key_factors, (3,), minval=1 - strength, maxval=1 + strength)
    return jax.random.permutation(key_order, 3), factors


def jitter(image: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation of one image, one after the other.

    Args:
      image: float32 [S, S, 3], whole numbers from 0 to 255.
      order, factors: see `draw_jitter`.
    """
    for i in range(3):
        grey = _grey(image)
        kind = order[i]
        other = jnp.where(kind == 0, 0, jnp.where(kind == 1, grey.mean(), grey))
        image = _blend(image, other, factors[kind])
    return image


def erased(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Erases a random box of each normalised image, as torchvision's RandomErasing does.

    Args:
      keys: random keys, [B], one for each image.
      images: [B, S, S, 3], normalised: erased pixels are 0, the mean colour.
      probability: that an image loses a box.
    """
    side = images.shape[1]

    def one(key, image):
        key_whether, key_box = jax.random.split(key)
        corner, sizes = draw_box(key_box, side)
        place = jnp.arange(side)
        rows, columns = (
            (place >= start) & (place < start + length)
            for start, length in zip(corner, sizes, strict=True)
        )
        box = rows[:, None] & columns & jax.random.bernoulli(key_whether, probability)
        return jnp.where(box[..., None], 0, image)

    return jax.vmap(one)(keys, images)


def draw_box(key: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Draws the box of random erasing.

    Its share of the area is uniform in [0.02, 0.33], the logarithm of its aspect in that of
    [0.3, 3.3], its place uniform; after ten draws that do not fit it is empty.

    Returns:
      (corner, sizes): float32 [2] each, whole px, vertical and horizontal.
    """
    key_area, key_aspect, key_place = jax.random.split(key, 3)
    low, high = _ERASED_AREA
    area = side**2 * jax.random.uniform(key_area, (10,), minval=low, maxval=high)
    low, high = np.log(_ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(key_aspect, (10,), minval=low, maxval=high))
    drawn = jnp.round(jnp.sqrt(area * jnp.stack([aspect, 1 / aspect]))).T
    fits = (drawn < side).all(axis=1)
    sizes = jnp.where(fits.any(), drawn[jnp.argmax(fits)], 0)
    corner = jnp.floor(jax.random.uniform(key_place, (2,)) * (side - sizes + 1))
    return corner, sizes
