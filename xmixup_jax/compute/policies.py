"""RandAugment, TrivialAugment, colour jitter and random erasing, on the device.

Each image has its own key. Operations, magnitudes and defaults are those of torchvision on uint8
images, with nearest-neighbour interpolation and black fill.

Under `vmap`, `lax.switch` computes all of its branches. Therefore the operations that move pixels
share one branch with a single gather, and on a CPU, where the other branches would cost most, the
images are processed one at a time.

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
"""Number of magnitudes of an operation, from no effect to the largest."""
OPERATIONS = (
    'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'brightness', 'color',
    'contrast', 'sharpness', 'posterize', 'solarize', 'autocontrast', 'equalize',
)  # fmt: skip
_SIGNED = OPERATIONS[1:10]
_GREY = (0.2989, 0.587, 0.114)
# Ranges for random erasing: share of the area, and height divided by width.
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)


def augment(options: ConfigDict, keys: jax.Array, images: jax.Array) -> jax.Array:
    """Applies the augmentation policy, then colour jitter.

    Args:
      options: config.augment.
      keys: random keys, [B], one for each image.
      images: [B, S, S, 3], uint8 or float32 from 0 to 255; float32 is rounded first.

    Returns:
      float32 [B, S, S, 3], whole numbers from 0 to 255.
    """
    images = jnp.round(images.astype(jnp.float32))
    key_policy, key_jitter = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if options.policy:

        def by_policy(key, image):
            drawn = draw(key, options, image.shape[0])
            return jax.lax.scan(lambda now, each: (apply(now, *each), None), image, drawn)[0]

        if jax.default_backend() == 'cpu':  # compute only the operation drawn for each image
            images = jax.lax.map(lambda each: by_policy(*each), (key_policy, images))
        else:
            images = jax.vmap(by_policy)(key_policy, images)
    if options.color_jitter:
        drawn = jax.vmap(partial(draw_jitter, strength=options.color_jitter))(key_jitter)
        images = jax.vmap(jitter)(images, *drawn)
    return images


def magnitudes(policy: str, side: int) -> np.ndarray:
    """Tabulates the magnitudes of each operation, without their signs.

    Args:
      policy: 'randaugment' or 'trivialaugment'.
      side: of the images in px.

    Returns:
      float32 [len(OPERATIONS), BINS].
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
    """Draws the operations for one image, as torchvision's policies do.

    Args:
      key: a random key.
      options: config.augment.
      side: of the image in px.

    Returns:
      (operations, magnitudes): int32 [n], positions in `OPERATIONS`, and float32 [n].
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
      magnitude: float32 scalar, with its sign; see `draw`.

    Returns:
      float32 [S, S, 3], whole numbers from 0 to 255.
    """
    step = jnp.exp2(8 - magnitude)
    recoloured = {
        'brightness': lambda: _blend(image, jnp.zeros(()), 1 + magnitude),
        'color': lambda: _blend(image, _grey(image), 1 + magnitude),
        'contrast': lambda: _blend(image, _grey(image).mean(), 1 + magnitude),
        'sharpness': lambda: _blend(image, _blur(image), 1 + magnitude),
        'posterize': lambda: jnp.floor(image / step) * step,
        'solarize': lambda: jnp.where(image >= magnitude, 255 - image, image),
        'autocontrast': lambda: _stretch(image),
        'equalize': lambda: _equalize(image),
    }
    # All other operations move pixels and share the first branch.
    branches = [lambda: _warp(image, operation, magnitude), *recoloured.values()]
    names = ['', *recoloured]
    branch = [names.index(name) if name in names else 0 for name in OPERATIONS]
    return jax.lax.switch(jnp.array(branch)[operation], branches)


def _warp(image: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Shears about the corner, translates, or rotates counter-clockwise about the middle."""
    shear_x, shear_y, shift_x, shift_y, angle = (
        jnp.where(operation == OPERATIONS.index(name), magnitude, 0)
        for name in ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')
    )
    side = image.shape[0]
    corner, middle = side / 2, (side - 1) / 2
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    # The position in `image` from which each output pixel is taken.
    x, y = jnp.meshgrid(*2 * [jnp.arange(side) - middle])
    from_x = cos * x - sin * y + shear_x * (y + corner) - shift_x + middle
    from_y = sin * x + cos * y + shear_y * (x + corner) - shift_y + middle
    column, row = jnp.round(from_x).astype(jnp.int32), jnp.round(from_y).astype(jnp.int32)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    place = jnp.where(inside, row * side + column, 0)
    return jnp.where(inside[..., None], image.reshape(-1, 3)[place], 0)


def _grey(image: jax.Array) -> jax.Array:
    """Converts to grey as Pillow does: [S, S, 1], whole numbers."""
    red, green, blue = (image[..., i : i + 1] * weight for i, weight in enumerate(_GREY))
    return jnp.floor(red + green + blue)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """Interpolates as Pillow does: values that both images share stay exact."""
    return jnp.floor(jnp.clip(other + factor * (image - other), 0, 255))


def _blur(image: jax.Array) -> jax.Array:
    """Averages each pixel (weight 5) and its eight neighbours (1); keeps the border."""
    total = jax.lax.reduce_window(image, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), 'SAME')
    place = jnp.arange(image.shape[0])
    inner = (place > 0) & (place < image.shape[0] - 1)
    return jnp.where(
        (inner[:, None] & inner)[..., None], jnp.round((total + 4 * image) / 13), image
    )


def _stretch(image: jax.Array) -> jax.Array:
    """Stretches each channel to the range from 0 to 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = jnp.floor((image - low) * (255 / jnp.maximum(high - low, 1)))
    return jnp.where(high > low, stretched, image)


def _equalize(image: jax.Array) -> jax.Array:
    """Equalises the histogram of each channel."""
    values = image.astype(jnp.int32)

    def one(channel):
        counts = jnp.bincount(channel.reshape(-1), length=256)
        # As in Pillow, pixels of the largest value do not count.
        step = (channel.size - counts[channel.max()]) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table, jnp.arange(256))[channel]

    return jax.vmap(one, 2, 2)(values).astype(image.dtype)


def draw_jitter(key: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Draws the colour jitter for one image, as torchvision's ColorJitter does.

    Args:
      key: a random key.
      strength: config.augment.color_jitter, in [0, 1].

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

    Returns:
      float32 [S, S, 3], whole numbers from 0 to 255.
    """
    for i in range(3):
        grey = _grey(image)
        kind = order[i]
        other = jnp.where(kind == 0, 0, jnp.where(kind == 1, grey.mean(), grey))
        image = _blend(image, other, factors[kind])
    return image


def erase(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Erases a random box of some images, as torchvision's RandomErasing does.

    Args:
      keys: random keys, [B], one for each image.
      images: float32 [B, S, S, 3], normalised; erased pixels become 0, the mean colour.
      probability: of erasing a box, for each image.

    Returns:
      float32 [B, S, S, 3].
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
    """Draws the box for random erasing.

    Its share of the area is uniform in [0.02, 0.33], the logarithm of its aspect ratio uniform in
    [log 0.3, log 3.3], and its position uniform. If ten draws do not fit into the image, the box is
    empty.

    Args:
      key: a random key.
      side: of the image in px.

    Returns:
      (corner, sizes): float32 [2] each, whole px, first vertical, then horizontal.
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
