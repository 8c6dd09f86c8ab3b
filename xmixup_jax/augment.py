"""Augmentation on the device: uint8 batches in, normalised float crops out."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xmixup_jax.models import MODELS

# Mean and standard deviation of the RGB channels, as torchvision and timm use them: ImageNet's,
# and the range from -1 to 1 of TensorFlow's Inception and of what came after it.
NORMALIZATIONS = {
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'inception': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def normalize(images: jax.Array, model: ConfigDict) -> jax.Array:
    """uint8 RGB [..., 3] in 0..255 to float32 as the network wants it.

    Args:
      images: to normalise.
      model: the `model` part of the configuration; 'normalization' may be '', then it is the one
        that timm's weights of this network were trained with.
    """
    mean, std = (255.0 * jnp.asarray(values, jnp.float32) for values in normalization(model))
    return (images.astype(jnp.float32) - mean) / std


def normalization(model: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the network's inputs, of values from 0 to 1."""
    return NORMALIZATIONS[model.normalization or MODELS[model.name].normalization]


def evaluation_view(config: ConfigDict, images: jax.Array) -> jax.Array:
    """What the network sees of uint8 [B, R, R, 3] in tests: the middle, normalised, float32."""
    return normalize(center_crop(images, config.image_size), config.model)


def random_crop_flip(keys: jax.Array, images: jax.Array, size: int, flip: bool) -> jax.Array:
    """A random crop of each image, mirrored left to right with probability 1/2 if `flip`.

    Args:
      keys: random keys, [B], one for each image.
      images: [B, R, R, C].
      size: side of the crop in px, <= R.
      flip: whether to mirror at random.

    Returns:
      [B, size, size, C], the images' dtype.
    """
    slack = images.shape[1] - size

    def one(key, image):
        key_crop, key_flip = jax.random.split(key)
        top, left = jax.random.randint(key_crop, (2,), 0, slack + 1)
        image = jax.lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[-1]))
        if flip:
            image = jnp.where(jax.random.bernoulli(key_flip), image[:, ::-1], image)
        return image

    return jax.vmap(one)(keys, images)


def center_crop(images: jax.Array, size: int) -> jax.Array:
    """The middle [B, size, size, C] of [B, R, R, C]."""
    start = (images.shape[1] - size) // 2
    return images[:, start : start + size, start : start + size]
