"""Crops, flips, augments and normalises images on the device: uint8 in, float32 out."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute import policies
from xmixup_jax.methods.base import Method
from xmixup_jax.models import MODELS, NORMALIZATIONS

PyTree = Any
Images = TypeVar('Images', jax.Array, np.ndarray)


def normalize(images: jax.Array, model: ConfigDict) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation of each channel.

    Args:
      images: RGB [..., 3], uint8 or float32, from 0 to 255.
      model: the `model` part of the configuration. With `normalization` '', the constants are those
        that timm's weights of this network were trained with.

    Returns:
      float32 [..., 3].
    """
    mean, std = (255.0 * jnp.asarray(values, jnp.float32) for values in normalization(model))
    return (images.astype(jnp.float32) - mean) / std


def denormalize(images: jax.Array, model: ConfigDict) -> jax.Array:
    """Inverts `normalize`; returns uint8, rounded and clipped to 0..255."""
    mean, std = (255.0 * jnp.asarray(values, jnp.float32) for values in normalization(model))
    return jnp.clip(jnp.round(images * std + mean), 0, 255).astype(jnp.uint8)


def normalization(model: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each input channel, for pixel values from 0 to 1."""
    return NORMALIZATIONS[model.normalization or MODELS[model.name].normalization]


def training_view(
    config: ConfigDict, keys: jax.Array, images: jax.Array, clean: bool = False
) -> jax.Array:
    """The network's training input: random crop and flip, config.augment, normalisation.

    Args:
      config: of the run.
      keys: random keys, [B], one for each image.
      images: uint8 [B, R, R, 3].
      clean: skip config.augment.

    Returns:
      float32 [B, S, S, 3], S = config.image_size.
    """
    options = config.augment
    crops = random_crop_flip(keys, images, config.image_size, config.flip, config.crop_min_area)
    if clean:
        return normalize(crops, config.model)
    # `random_crop_flip` splits each key in two; fold_in with 2 and 3 gives independent keys.
    key_policy, key_erasing = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (2, 3))
    if options.policy or options.color_jitter:
        crops = policies.augment(options, key_policy, crops)
    view = normalize(crops, config.model)
    return policies.erase(key_erasing, view, options.erasing) if options.erasing else view


def evaluation_view(config: ConfigDict, images: jax.Array) -> jax.Array:
    """The network's test input: centre crops of uint8 [B, R, R, 3], normalised, float32."""
    return normalize(center_crop(images, config.image_size), config.model)


def prepare_batch(
    config: ConfigDict, method: Method, batch: PyTree, step: jax.Array | int, clean: bool = False
) -> tuple[jax.Array, PyTree]:
    """Keys for the method, and its batch of `training_view`s."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(batch['seed'])
    key_image, key_second, key_method = keys[:, 0], keys[:, 1], keys[:, 2]
    prepare = partial(training_view, config, clean=clean)
    images = {'image': prepare(key_image, batch['image']), 'label': batch['label']}
    images['progress'] = jnp.full(len(batch['label']), step / config.steps, jnp.float32)
    if method.pairs:
        images['source_image'] = prepare(key_second, batch['source_image'])
        images['source_label'] = batch['source_label']
    if method.second_view:
        images['second_image'] = prepare(key_second, batch['image'])
    return key_method, images


def random_crop_flip(
    keys: jax.Array, images: jax.Array, size: int, flip: bool, min_area: float = 0.0
) -> jax.Array:
    """Crops each image at random, and mirrors it left to right with probability 1/2 if `flip`.

    Args:
      keys: random keys, [B], one for each image.
      images: [B, R, R, C].
      size: side of the crop in px, at most R.
      flip: whether to mirror at random.
      min_area: 0 crops a window of `size`; a positive value crops as in `random_part` and resizes.

    Returns:
      [B, size, size, C] in the dtype of the images, or float32 if they were resized.
    """
    slack = images.shape[1] - size

    def one(key, image):
        key_crop, key_flip = jax.random.split(key)
        if min_area:
            image = resized_part(image, *random_part(key_crop, image.shape[0], min_area), size)
        else:
            top, left = jax.random.randint(key_crop, (2,), 0, slack + 1)
            image = jax.lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[-1]))
        if flip:
            image = jnp.where(jax.random.bernoulli(key_flip), image[:, ::-1], image)
        return image

    return jax.vmap(one)(keys, images)


def random_part(key: jax.Array, side: int, min_area: float) -> tuple[jax.Array, jax.Array]:
    """Draws a random part of a square image, as torchvision's RandomResizedCrop does.

    Its share of the area is uniform in [min_area, 1], the logarithm of its aspect ratio uniform in
    [log 3/4, log 4/3], and its position uniform. If ten draws do not fit into the image, the part
    is the whole image. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6
    (https://arxiv.org/abs/1409.4842).

    Args:
      key: a random key.
      side: of the image in px.
      min_area: the smallest share of the area, in (0, 1].

    Returns:
      (corner, sizes): float32 [2] each, whole px, first vertical, then horizontal.
    """
    key_area, key_aspect, key_place = jax.random.split(key, 3)
    area = side**2 * jax.random.uniform(key_area, (10,), minval=min_area)
    limit = jnp.log(4 / 3)
    aspect = jnp.exp(jax.random.uniform(key_aspect, (10,), minval=-limit, maxval=limit))
    drawn = jnp.round(jnp.sqrt(area * jnp.stack([1 / aspect, aspect]))).T
    fits = ((drawn > 0) & (drawn <= side)).all(axis=1)
    sizes = jnp.where(fits.any(), drawn[jnp.argmax(fits)], side)
    corner = jnp.floor(jax.random.uniform(key_place, (2,)) * (side - sizes + 1))
    return corner, sizes


def resized_part(image: jax.Array, corner: jax.Array, sizes: jax.Array, size: int) -> jax.Array:
    """Resizes a part of an image, bilinear with antialiasing, as Pillow does.

    Args:
      image: [R, R, C].
      corner, sizes: of the part, [2] each; see `random_part`.
      size: side of the result in px.

    Returns:
      float32 [size, size, C].
    """
    scale = size / sizes
    return jax.image.scale_and_translate(
        image.astype(jnp.float32),
        (size, size, image.shape[-1]),
        (0, 1),
        scale,
        -corner * scale,
        'linear',
    )


def center_crop(images: Images, size: int) -> Images:
    """Cuts the middle [B, size, size, C] out of [B, R, R, C]."""
    start = (images.shape[1] - size) // 2
    return images[:, start : start + size, start : start + size]
