"""SGD, AdamW and LAMB, with separate learning rates for the head and for each layer."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

PyTree = Any
HEAD = 'fc'
OPTIMIZERS = ('sgd', 'adamw', 'lamb')
DECAYED = ('all', 'kernels')
_EMBEDDINGS = ('cls_token', 'reg_token', 'pos_embed')
_STEM = ('conv1', 'bn1', 'conv_stem', 'stem', 'patch_embed', 'norm_pre', *_EMBEDDINGS)


def make_schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then one drop ('step') or 'cosine' to 0.

    Args:
      optimizer: the `optimizer` part of the configuration.
      steps: of the whole run.
    """
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
    """The state of `scale_by_rates`.

    The peak learning rate is part of the state, not of the compiled program, so that runs that
    differ only in it share one program.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
    """int32, the number of updates done."""
    peak: jax.Array
    """float32, the largest learning rate."""


def set_peak(opt_state: PyTree, peak: jax.typing.ArrayLike) -> PyTree:
    """Sets the peak learning rate in an optimiser's state."""
    return optax.tree.set(opt_state, peak=peak)


def scale_by_rates(
    peak: float,
    schedule: optax.Schedule,
    head_schedule: optax.Schedule,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Multiplies updates by minus the learning rate, peak * schedule(step) * layer_decay ** depth.

    Args:
      peak: the first peak learning rate, see `set_peak`.
      schedule: relative learning rate of the backbone by step.
      head_schedule: relative learning rate of the head by step.
      layer_decay: factor for each layer further from the head, see `depths`.
    """

    def init(params: PyTree) -> RateState:
        del params
        return RateState(jnp.zeros((), jnp.int32), jnp.asarray(peak, jnp.float32))

    def update(updates: PyTree, state: RateState, params: PyTree = None):
        del params
        rates = [-state.peak * each(state.count) for each in (schedule, head_schedule)]
        scaled = jax.tree.map(lambda head, x: rates[head] * x, is_head(updates), updates)
        if layer_decay != 1:
            scaled = jax.tree.map(lambda d, x: layer_decay**d * x, depths(updates), scaled)
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def make_optimizer(
    optimizer: ConfigDict,
    steps: int,
    *,
    weight_decay: bool = True,
    head_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """Makes the optimiser described by the configuration.

    `sgd` has momentum and coupled weight decay, as in PyTorch. `adamw` (Loshchilov and Hutter, ICLR
    2019, https://arxiv.org/abs/1711.05101) and `lamb` (You et al., ICLR 2020,
    https://arxiv.org/abs/1904.00962) have decoupled weight decay and the betas `momentum` and `b2`.
    A gradient whose norm over all parameters exceeds `clip_norm` is scaled down to it.

    Args:
      optimizer: the `optimizer` part of the configuration.
      steps: of the whole run.
      weight_decay: False if a penalty of the method replaces weight decay.
      head_schedule: learning rate of the head by step, as a multiple of the peak; by default that
        of the backbone times optimizer.head_multiplier.
    """
    relative = optimizer.copy_and_resolve_references()
    relative.learning_rate = 1.0
    schedule = make_schedule(relative, steps)
    if head_schedule is None:

        def head_schedule(step):
            return optimizer.head_multiplier * schedule(step)

    decay = optax.add_decayed_weights(
        optimizer.weight_decay if weight_decay else 0.0,
        is_kernel if optimizer.decayed == 'kernels' else None,
    )
    adam = optax.scale_by_adam(optimizer.momentum, optimizer.b2)
    parts = {
        'sgd': (decay, optax.trace(optimizer.momentum, optimizer.nesterov)),
        'adamw': (adam, decay),
        'lamb': (adam, decay, optax.scale_by_trust_ratio()),
    }[optimizer.name]
    if optimizer.clip_norm:
        parts = (optax.clip_by_global_norm(optimizer.clip_norm), *parts)
    rates = scale_by_rates(optimizer.learning_rate, schedule, head_schedule, optimizer.layer_decay)
    return optax.chain(*parts, rates)


def is_head(params: PyTree) -> PyTree:
    """Tells which leaves belong to the head."""
    return jax.tree.map_with_path(lambda path, _: path[0].key == HEAD, params)


def is_kernel(params: PyTree) -> PyTree:
    """Tells which leaves are kernels, not biases, norms or a ViT's tokens and positions."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.ndim > 1 and path[0].key not in _EMBEDDINGS, params
    )


def depths(params: PyTree) -> PyTree:
    """Counts how many layers each leaf is away from the head; the head itself is 0.

    Layers are the stem, each residual block (or Inception module) and the head. Parameters after
    the blocks belong to the last block, as in timm's `layer_decay`.

    >>> leaf = jnp.zeros(())
    >>> depths({'conv1': leaf, 'layer1': {0: leaf, 1: leaf}, 'layer2': {0: leaf}, 'fc': leaf})
    {'conv1': 4, 'fc': 0, 'layer1': {0: 3, 1: 2}, 'layer2': {0: 1}}
    """
    layers = {path: _layer(path) for path, _ in jax.tree.leaves_with_path(params)}
    blocks = (layer for layer in layers.values() if layer not in (_AFTER, _TOP))
    last_block = max(blocks, default=_AFTER)  # a frozen backbone has no blocks here
    layers = {path: last_block if each == _AFTER else each for path, each in layers.items()}
    order = sorted(set(layers.values()))
    return jax.tree.map_with_path(
        lambda path, _: len(order) - 1 - order.index(layers[path]), params
    )


# Layers are (part of the network, name, indices), which sorts them in the order of the network.
_AFTER = 2, '', ()
_TOP = 3, '', ()


def _layer(path) -> tuple[int, str, tuple[int, ...]]:
    first, *others = [entry.key for entry in path]
    if first in _STEM:
        return 0, '', ()
    if first in (HEAD, 'head'):  # 'head' is ConvNeXt's norm before the head
        return _TOP
    if first == 'stages':  # ConvNeXt; downsampling belongs to the block after it
        stage, part, number = others[:3]
        return 1, first, (stage, number if part == 'blocks' else 0)
    indices = tuple(itertools.takewhile(lambda each: isinstance(each, int), others))
    if indices or first[0].isupper():  # the names of Inception's modules sort in their order
        return 1, first, indices
    return _AFTER
