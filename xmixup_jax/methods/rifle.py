"""Draws the head anew several times, so that the deep layers keep getting gradients.

Li, Xiong, An, Xu, Dou, "RIFLE: Backpropagation in Depth for Deep Transfer Learning through
Re-Initializing the Fully-connected LayEr", ICML 2020, https://arxiv.org/abs/2007.03349: the run is
divided into equal periods, and each begins with a new head.

As in the authors' script (lixingjian/RIFLE) the new head is drawn like the first one
(config.head_init), momentum is kept, and the head's learning rate is the backbone's. The authors
train with config.optimizer.schedule=cosine. `cyclic` = True is their option `fc_lr_util=cyclic`:
the head's rate falls by a cosine within each period.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from xmixup_jax.methods.base import Method, View
from xmixup_jax.methods.options import count, flag
from xmixup_jax.models.base import draw_head
from xmixup_jax.optimizer import HEAD, make_optimizer


def period(periods: int, steps: int) -> int:
    """Steps of a period. The last period also has the steps that are left over."""
    return max(1, steps // periods)


def cyclic_schedule(periods: int, steps: int, peak: float):
    """The head's learning rate by step, as a multiple of the backbone's first rate. Each period
    begins at `peak` and falls by a cosine."""
    length = period(periods, steps)
    last_start = (periods - 1) * length
    last_length = max(1, steps - last_start)

    def schedule(step):
        in_last = step >= last_start
        done = jnp.where(in_last, (step - last_start) / last_length, (step % length) / length)
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return schedule


def optimizer(options, config):
    head_schedule = None
    if options.cyclic:
        head_schedule = cyclic_schedule(
            options.periods, config.steps, config.optimizer.head_multiplier
        )
    return make_optimizer(config.optimizer, config.steps, head_schedule=head_schedule)


def after_step(view: View, state):
    """Draws the head anew at the end of each period but the last."""
    periods = view.options.periods
    length = period(periods, view.config.steps)
    ends = (state.step % length == 0) & (state.step < length * periods)
    fc = state.params[HEAD]
    inputs, outputs = fc['kernel'].shape
    new = draw_head(view.key, inputs, outputs, view.config.head_init)
    fc = jax.tree.map(lambda drawn, kept: jnp.where(ends, drawn, kept), new, fc)
    return replace(state, params=state.params | {HEAD: fc})


METHOD = Method(
    options={
        'periods': count(2, 'equal parts of the run, each of which begins with a new head'),
        'cyclic': flag(False, "the head's rate falls by a cosine within each period"),
    },
    after_step=after_step,
    optimizer=optimizer,
)
