"""RIFLE: the head is drawn anew several times, so that the deep layers keep getting gradients.

Li, Xiong, An, Xu, Dou, "RIFLE: Backpropagation in Depth for Deep Transfer Learning through
Re-Initializing the Fully-connected LayEr", ICML 2020: the run is cut into equal
periods; each begins with a new head, whose learning rate falls by a cosine within the period
while the other layers follow the run's schedule.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from xmixup_jax.methods.base import Method, View
from xmixup_jax.optimizer import HEAD, make_optimizer


def period(config) -> int:
    """Steps of a period; what is left over is added to the last one."""
    return max(1, config.steps // config.rifle.periods)


def head_schedule(config):
    """Learning rate of the head by step."""
    length = period(config)
    peak = config.optimizer.learning_rate * config.optimizer.head_multiplier
    last_start = (config.rifle.periods - 1) * length
    last_length = max(1, config.steps - last_start)

    def schedule(step):
        in_last = step >= last_start
        done = jnp.where(in_last, (step - last_start) / last_length, (step % length) / length)
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return schedule


def after_step(view: View, state):
    """Draws the head anew where a period ends, all but the last."""
    length, periods = period(view.config), view.config.rifle.periods
    ends = (state.step % length == 0) & (state.step < length * periods)
    fc = state.params[HEAD]
    kernel = nnx.initializers.lecun_normal()(view.key, fc['kernel'].shape)
    new = {'kernel': kernel, 'bias': jnp.zeros_like(fc['bias'])}
    fc = jax.tree.map(lambda drawn, kept: jnp.where(ends, drawn, kept), new, fc)
    return replace(state, params=state.params | {HEAD: fc})


METHOD = Method(
    defaults={'periods': 2},
    after_step=after_step,
    optimizer=lambda config: make_optimizer(
        config.optimizer, config.steps, head_schedule=head_schedule(config)
    ),
)
