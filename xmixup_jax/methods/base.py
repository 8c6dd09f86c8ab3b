"""What a transfer-learning method has to say about one training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from xmixup_jax.models.base import Outputs

Batch = dict[str, Any]


class Method(NamedTuple):
    """Three pure functions and a flag; the loop knows nothing else of a method."""

    uses_source: bool
    """Whether each target record comes with an auxiliary source record."""

    num_logits: Callable[[ConfigDict, int, int], int]
    """(config, K_t, K_s) to the head's width; the first K_t logits are the target's."""

    transform: Callable[[ConfigDict, jax.Array, Batch], Batch]
    """(config, keys [B], batch) to the batch whose 'image' goes through the network.

    The batch holds 'image' float32 [B, H, W, 3], 'label' int32 [B] and, where the method uses
    the source, 'source_image' and 'source_label' (an index among the selected source classes).
    """

    loss: Callable[[ConfigDict, int, Outputs, Batch], jax.Array]
    """(config, K_t, outputs of the transformed batch, transformed batch) to the scalar loss."""
