"""What every backbone returns."""

from typing import NamedTuple

import jax


class Outputs(NamedTuple):
    """One forward pass over B images."""

    logits: jax.Array
    """float32 [B, K]."""
    features: jax.Array
    """float32 [B, D], globally pooled, the head's input."""
    stages: tuple[jax.Array, ...]
    """The last feature map of each stage, [B, h, w, c]."""
