"""The optimiser: SGD with momentum, the head at a learning rate of its own."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

PyTree = Any
HEAD = 'fc'


def make_schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then `step` (one drop) or `cosine` (to 0)."""
    warmup = optimizer.warmup_steps
    peak = optimizer.learning_rate
    if optimizer.schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    drop = round(optimizer.drop_at * steps)
    schedule = optax.piecewise_constant_schedule(peak, {drop - warmup: optimizer.drop_factor})
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def make_optimizer(
    optimizer: ConfigDict,
    steps: int,
    *,
    weight_decay: bool = True,
    head_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, as in PyTorch.

    Args:
      optimizer: the `optimizer` part of the configuration.
      steps: of the whole run.
      weight_decay: False where a method's own penalty replaces it.
      head_schedule: learning rate of the head by step; by default the network's, times
        optimizer.head_multiplier.
    """
    schedule = make_schedule(optimizer, steps)
    if head_schedule is None:

        def head_schedule(step):
            return optimizer.head_multiplier * schedule(step)

    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay if weight_decay else 0.0),
        optax.trace(optimizer.momentum, optimizer.nesterov),
        optax.masked(optax.scale_by_learning_rate(schedule), is_backbone),
        optax.masked(optax.scale_by_learning_rate(head_schedule), is_head),
    )


def is_head(params: PyTree) -> PyTree:
    """True for the head's leaves."""
    return jax.tree.map_with_path(lambda path, _: path[0].key == HEAD, params)


def is_backbone(params: PyTree) -> PyTree:
    """True for all leaves but the head's."""
    return jax.tree.map_with_path(lambda path, _: path[0].key != HEAD, params)
