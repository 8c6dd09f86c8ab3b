"""The optimiser: SGD with momentum, the head at a learning rate of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class RateState(NamedTuple):
    """The peak of the learning rate is a part of the state, not of the compiled program: runs that
    differ in nothing else share one."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
    """int32, updates done."""
    peak: jax.Array
    """float32."""


def set_peak(opt_state: PyTree, peak: jax.typing.ArrayLike) -> PyTree:
    """The state with another peak of the learning rate."""
    return optax.tree.set(opt_state, peak=peak)


def scale_by_rates(
    peak: float, schedule: optax.Schedule, head_schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate, which is peak * schedule(step)."""

    def init(params: PyTree) -> RateState:
        del params
        return RateState(jnp.zeros((), jnp.int32), jnp.asarray(peak, jnp.float32))

    def update(updates: PyTree, state: RateState, params: PyTree = None):
        del params
        rates = [-state.peak * each(state.count) for each in (schedule, head_schedule)]
        scaled = jax.tree.map(lambda head, x: rates[head] * x, is_head(updates), updates)
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


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
      head_schedule: learning rate of the head by step, as a multiple of the peak; by default the
        network's, times optimizer.head_multiplier.
    """
    relative = optimizer.copy_and_resolve_references()
    relative.learning_rate = 1.0
    schedule = make_schedule(relative, steps)
    if head_schedule is None:

        def head_schedule(step):
            return optimizer.head_multiplier * schedule(step)

    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay if weight_decay else 0.0),
        optax.trace(optimizer.momentum, optimizer.nesterov),
        scale_by_rates(optimizer.learning_rate, schedule, head_schedule),
    )


def is_head(params: PyTree) -> PyTree:
    """True for the head's leaves."""
    return jax.tree.map_with_path(lambda path, _: path[0].key == HEAD, params)
