"""Mixup across domains: pure functions on one batch, for use inside a jitted step.

The mixed image and its soft label follow Zhang et al., "mixup: Beyond Empirical Risk Minimization"
(ICLR 2018, https://arxiv.org/abs/1710.09412). Mixing a target image with an image of a matched
source class is XMixup (https://arxiv.org/abs/2007.10252). The distribution of lambda and the label
spaces are options of this project, since the available text of the paper does not specify them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
LABEL_SPACES = ('joint', 'separate', 'target')
LAM_DRAWS = ('sample', 'batch')


def sample_lam(keys: jax.Array, alpha: float, reflect: bool, per: str = 'sample') -> jax.Array:
    """Draws mixing weights, lam ~ Beta(alpha, alpha).

    Args:
      keys: random keys, [B].
      alpha: concentration, > 0; small values put lam near 0 or 1.
      reflect: replace lam by max(lam, 1 - lam), so that the target image dominates.
      per: 'sample', one weight for each sample; 'batch', a single one for the whole batch, under a
        mapped axis 'batch'.

    Returns:
      lam, float32 [B], in [0, 1] ([0.5, 1] when reflected).
    """
    lam = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha, dtype=jnp.float32))(keys)
    if per == 'batch':
        lam = broadcast_first(lam)
    return jnp.maximum(lam, 1.0 - lam) if reflect else lam


def broadcast_first(x: jax.Array) -> jax.Array:
    """Broadcasts the value of the first record to the whole batch, under a mapped axis 'batch'.

    The first record is on the first device, so the value does not depend on the number of devices.

    Args:
      x: [B, ...], one device's share.

    Returns:
      [B, ...].
    """
    first = jax.lax.all_gather(x[0], 'batch')[0]
    return jnp.broadcast_to(first, x.shape)


def cross_domain_mixup(
    keys: jax.Array,
    images: jax.Array,
    source_images: jax.Array,
    alpha: float = 0.2,
    reflect: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each target image with the source image at the same position in the batch (XMixup).

    Args:
      keys: random keys, [B], or one key.
      images: of the target, float [B, H, W, C].
      source_images: of the matched source classes, float [B, H, W, C].
      alpha, reflect: see `sample_lam`.

    Returns:
      (mixed images float [B, H, W, C], lam float32 [B]), for `mixed_cross_entropy`.

    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> ones = jnp.ones((4, 8, 8, 3))
    >>> mixed, lam = cross_domain_mixup(keys, ones, 0 * ones, alpha=1.0)
    >>> bool(jnp.allclose(mixed.mean((1, 2, 3)), lam)), bool((lam >= 0.5).all())
    (True, True)
    """
    if keys.ndim == 0:
        keys = jax.random.split(keys, len(images))
    lam = sample_lam(keys, alpha, reflect)
    return mix_images(images, source_images, lam), lam


def mix_images(images: jax.Array, source_images: jax.Array, lam: jax.Array) -> jax.Array:
    """Returns lam * images + (1 - lam) * source_images.

    Args:
      images, source_images: float [B, ...], images or feature maps.
      lam: float32 [B].
    """
    lam = lam.reshape(-1, *[1] * (images.ndim - 1)).astype(images.dtype)
    return lam * images + (1.0 - lam) * source_images


def neighbour(tree: PyTree) -> PyTree:
    """Rolls a batch by one: each record gets the one before it, and the first gets the last.

    Records are in random order, so this gives each a random partner. It crosses the devices of the
    mapped axis 'batch', so the partners do not depend on the number of devices.

    Args:
      tree: arrays [B, ...], one device's share.

    Returns:
      the same structure, with the values of the partners.
    """
    devices = jax.lax.axis_size('batch')
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def roll(x):
        last = jax.lax.ppermute(x[-1:], 'batch', to_next)
        return jnp.concatenate([last, x[:-1]])

    return jax.tree.map(roll, tree)


def class_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None,
) -> jax.Array:
    """Computes (1 - e) w[y] (-log p[y]) + e / K sum_c w[c] (-log p[c]) for each sample.

    This is PyTorch's `CrossEntropyLoss` before averaging. Label smoothing is from Szegedy et al.,
    "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7
    (https://arxiv.org/abs/1512.00567).

    Args:
      logits: float [B, K].
      labels: int32 [B], y.
      label_smoothing: e, in [0, 1).
      class_weights: w, float32 [K]; None for all 1.

    Returns:
      float32 [B].

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> loss = class_cross_entropy(logits, jnp.array([0]), label_smoothing=0.3)
    >>> round(float(loss[0] / jnp.log(2)), 4)  # 0.7 * 1 bit + 0.3 * (1 + 2 + 2) / 3 bits
    1.2
    """
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if class_weights is not None:
        loss = class_weights[labels] * loss
    if not label_smoothing:
        return loss
    surprise = -jax.nn.log_softmax(logits)
    if class_weights is not None:
        surprise = class_weights * surprise
    return (1.0 - label_smoothing) * loss + label_smoothing * surprise.mean(axis=-1)


def two_label_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    other_labels: jax.Array,
    lam: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None,
) -> jax.Array:
    """Computes -lam log p[y] - (1 - lam) log p[y'] for each sample.

    Args:
      logits: float [B, K].
      labels, other_labels: int32 [B], y and y'.
      lam: float32 [B].
      label_smoothing, class_weights: for both terms, see `class_cross_entropy`.

    Returns:
      float32 [B].

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> loss = two_label_cross_entropy(logits, jnp.array([0]), jnp.array([2]), jnp.array([0.5]))
    >>> round(float(loss[0] / jnp.log(2)), 4)
    1.5
    """
    first, second = (
        class_cross_entropy(logits, each, label_smoothing, class_weights)
        for each in (labels, other_labels)
    )
    return lam * first + (1.0 - lam) * second


def mixed_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    source_labels: jax.Array,
    lam: jax.Array,
    label_space: str,
    num_classes: int,
    label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None,
) -> jax.Array:
    """Computes the cross-entropy of each mixed image.

    `p` is the softmax over all columns, `p_t` over the first K_t columns, `p_s` over the others:

    - `joint`:    -lam log p[y_t] - (1 - lam) log p[K_t + y_s]   (one head, one softmax)
    - `separate`: -lam log p_t[y_t] - (1 - lam) log p_s[y_s]     (two heads)
    - `target`:   -log p_t[y_t]                                  (the label stays y_t)

    Args:
      logits: float [B, K_t + K_s]; for `target`, [B, K_t] is enough.
      labels: int32 [B], y_t, target classes in 0..K_t - 1.
      source_labels: int32 [B], y_s, positions among the selected source classes, in 0..K_s - 1.
      lam: float32 [B], weight of the target.
      label_space: one of LABEL_SPACES.
      num_classes: K_t.
      label_smoothing: of each softmax, over its own columns; see `class_cross_entropy`.
      class_weights: of the target classes, float32 [K_t]; source classes have weight 1.

    Returns:
      float32 [B].

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))  # two target classes, one source class
    >>> label, source_label = jnp.array([0]), jnp.array([0])
    >>> loss = mixed_cross_entropy(logits, label, source_label, jnp.array([0.75]), 'joint', 2)
    >>> round(float(loss[0] / jnp.log(2)), 4)  # 0.75 * 1 bit + 0.25 * 2 bits
    1.25
    """
    if label_space == 'joint':
        weights = class_weights
        if weights is not None:
            weights = jnp.pad(weights, (0, logits.shape[1] - num_classes), constant_values=1.0)
        source_labels = num_classes + source_labels
        return two_label_cross_entropy(logits, labels, source_labels, lam, label_smoothing, weights)
    target_logits, source_logits = jnp.split(logits, [num_classes], axis=1)
    loss_t = class_cross_entropy(target_logits, labels, label_smoothing, class_weights)
    if label_space == 'target':
        return loss_t
    if label_space == 'separate':
        loss_s = class_cross_entropy(source_logits, source_labels, label_smoothing)
        return lam * loss_t + (1.0 - lam) * loss_s
    raise ValueError(f'label_space must be one of {LABEL_SPACES}, not {label_space!r}')
