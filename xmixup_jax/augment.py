"""Augmentation on the device: uint8 batches in, normalised float crops out."""

import jax
import jax.numpy as jnp

# Mean and standard deviation of ImageNet's RGB channels, as torchvision and timm use them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array) -> jax.Array:
    """uint8 RGB [..., 3] in 0..255 to float32 with ImageNet's mean 0 and deviation 1."""
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32) * 255.0
    std = jnp.asarray(IMAGENET_STD, jnp.float32) * 255.0
    return (images.astype(jnp.float32) - mean) / std


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
