"""Test-time augmentation: averages the predicted probabilities over views of an image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xmixup_jax.compute.augment import evaluation_view, normalize

VIEWS = (1, 2, 10)


def over_views(
    config: ConfigDict, logits_of: Callable[[jax.Array], jax.Array], images: jax.Array
) -> jax.Array:
    """Computes the logits of images, or with several views the logarithm of the mean probabilities.

    The ten views are those of Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep
    convolutional neural networks", NeurIPS 2012, section 4.1. The network processes one view of the
    batch at a time, so several views need no more memory than one.

    Args:
      config: config.test_views is 1 for the centre crop; 2 for the centre crop and its mirror
        image; 10 for the centre and four corner crops, and their mirror images.
      logits_of: maps normalised crops, float32 [B, S, S, 3], to logits [B, K].
      images: uint8 [B, R, R, 3].

    Returns:
      float32 [B, K].
    """
    views, size = config.test_views, config.image_size
    if views == 1:
        return logits_of(evaluation_view(config, images)).astype(jnp.float32)
    end = images.shape[1] - size
    corners = [(end // 2, end // 2)]
    if views == 10:
        corners += [(0, 0), (0, end), (end, 0), (end, end)]

    def add(total, view):
        (top, left), mirrored = view
        crops = jax.lax.dynamic_slice(
            images, (0, top, left, 0), (len(images), size, size, images.shape[-1])
        )
        crops = jnp.where(mirrored, crops[:, :, ::-1], crops)
        logits = logits_of(normalize(crops, config.model)).astype(jnp.float32)
        return jnp.logaddexp(total, jax.nn.log_softmax(logits)), None

    shape = jax.eval_shape(lambda: logits_of(evaluation_view(config, images))).shape
    start = jnp.full(shape, -jnp.inf)
    each = (jnp.array(2 * corners), jnp.arange(views) >= views // 2)
    # On CPUs, XLA runs convolutions inside a loop about ten times slower.
    total, _ = jax.lax.scan(add, start, each, unroll=jax.default_backend() == 'cpu')
    return total - jnp.log(views)
