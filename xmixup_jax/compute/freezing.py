"""Freezes parts of the backbone: config.freeze."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Var

from xmixup_jax.errors import ConfigError
from xmixup_jax.models import forward
from xmixup_jax.models.normalization import BatchNorm
from xmixup_jax.optimizer import is_head

PyTree = Any


def frozen_params(
    freeze: str, image_size: int, graphdef: Any, params: PyTree, batch_stats: PyTree
) -> PyTree:
    """Tells which parameters config.freeze freezes.

    Args:
      freeze: 'backbone', or a number of stages, counted from the first one. Everything before a
        frozen stage, such as the stem, is frozen too.
      image_size: side of the images in px.
      graphdef, params, batch_stats: the network, as arrays or shapes.

    Returns:
      a tree like `params`, with True for the frozen ones.

    Raises:
      ConfigError: the network has fewer stages.
    """
    if freeze == 'backbone':
        return jax.tree.map(lambda head: not head, is_head(params))
    count = int(freeze)

    def end_of_stage(params, batch_stats):
        images = jnp.zeros((1, image_size, image_size, 3))
        stages = forward(graphdef, params, batch_stats, images, train=False)[0].stages
        if count > len(stages):
            raise ConfigError(
                f'config.freeze={freeze}: the network has only {len(stages)} stages; give a number '
                f'from 1 to {len(stages)}, or config.freeze=backbone'
            )
        return stages[count - 1]

    return _used(end_of_stage, params, batch_stats)[0]


def _used(function, *trees: PyTree) -> tuple[PyTree, ...]:
    """Tells which leaves of its arguments the result of a function depends on."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
    traced = jax.make_jaxpr(function)(*shapes).jaxpr
    needed = set(traced.outvars)
    for equation in reversed(traced.eqns):
        if needed.intersection(equation.outvars):
            needed.update(each for each in equation.invars if isinstance(each, Var))
    leaves = [each in needed for each in traced.invars]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def freeze_batch_norms(graphdef: Any, params: PyTree, batch_stats: PyTree, frozen: PyTree) -> Any:
    """The network's graph, in which batch norms with frozen parameters keep their statistics."""
    model, layers = nnx.merge(graphdef, params, batch_stats), _layers(frozen)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, BatchNorm) and path in layers:
            layer.frozen = True
    return nnx.graphdef(model)


def restore_frozen(statistics: PyTree, stored: PyTree, frozen: PyTree) -> PyTree:
    """Replaces the batch statistics of frozen layers by the stored ones."""
    layers = _layers(frozen)
    return jax.tree.map_with_path(
        lambda path, new, old: np.asarray(old) if _keys(path[:-1]) in layers else new,
        statistics,
        stored,
    )


def _layers(frozen: PyTree) -> set[tuple]:
    """The paths of the layers with frozen parameters."""
    return {_keys(path[:-1]) for path, stays in jax.tree.leaves_with_path(frozen) if stays}


def _keys(path) -> tuple:
    return tuple(entry.key for entry in path)


def stop_gradients(params: PyTree, frozen: PyTree) -> PyTree:
    """Stops the gradient at frozen parameters, so that it is not computed."""
    return jax.tree.map(
        lambda leaf, stays: jax.lax.stop_gradient(leaf) if stays else leaf, params, frozen
    )


def skip_frozen(tx: optax.GradientTransformation, frozen: PyTree) -> optax.GradientTransformation:
    """Limits an optimiser to trained parameters: frozen ones get no update, decay or state."""
    labels = jax.tree.map(lambda stays: 'frozen' if stays else 'trained', frozen)
    return optax.multi_transform({'frozen': optax.set_to_zero(), 'trained': tx}, labels)
