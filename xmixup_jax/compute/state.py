"""The state of training, and the moving average of the network's weights."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything a training step changes."""

    step: jax.Array
    """int32 scalar, the number of updates done."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    memory: PyTree
    """The method's own state: nested dicts of arrays."""
    average: PyTree = field(default_factory=dict)
    """Moving averages of 'params' and 'batch_stats'; {} without config.ema_decay."""


def with_average(state: TrainState) -> TrainState:
    """Starts the moving average at the current network."""
    return replace(state, average={'params': state.params, 'batch_stats': state.batch_stats})


def update_average(state: TrainState, decay: float) -> TrainState:
    """Updates the moving average after a step.

    At step t the decay is min(decay, (1 + t) / (10 + t)), so that the average soon forgets the
    first networks, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`.

    Args:
      state: after the step, with an average.
      decay: config.ema_decay.
    """
    t = state.step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    network = {'params': state.params, 'batch_stats': state.batch_stats}
    return replace(state, average=optax.incremental_update(network, state.average, 1.0 - kept))


def averaged(state: TrainState) -> TrainState:
    """Replaces the network by its moving average."""
    return replace(state, **state.average)
