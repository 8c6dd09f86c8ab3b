"""What a training step changes, and the moving average of the network beside it."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array
    """int32 scalar, updates done."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    memory: PyTree
    """The method's own, nested dicts of arrays."""
    average: PyTree = field(default_factory=dict)
    """The moving averages of 'params' and 'batch_stats' with config.ema_decay; {} without."""


def with_average(state: TrainState) -> TrainState:
    """The state whose average begins at its network."""
    return replace(state, average={'params': state.params, 'batch_stats': state.batch_stats})


def follow(state: TrainState, decay: float) -> TrainState:
    """Moves the average towards the network after a step.

    At step t it keeps min(decay, (1 + t) / (10 + t)) of itself, so that the first networks are soon
    forgotten, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`.

    Args:
      state: after the step, with an average.
      decay: config.ema_decay.
    """
    t = state.step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    network = {'params': state.params, 'batch_stats': state.batch_stats}
    return replace(state, average=optax.incremental_update(network, state.average, 1.0 - kept))


def averaged(state: TrainState) -> TrainState:
    """The state with the average in the place of the network."""
    return replace(state, **state.average)
