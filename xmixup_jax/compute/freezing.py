"""Parts of the backbone that stay as they are: config.freeze."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Var

from xmixup_jax.errors import ConfigError
from xmixup_jax.models import forward
from xmixup_jax.models.base import BatchNorm
from xmixup_jax.optimizer import is_head

PyTree = Any


def frozen_params(
    freeze: str, image_size: int, graphdef: Any, params: PyTree, batch_stats: PyTree
) -> PyTree:
    """True for the parameters that config.freeze leaves as they are.

    Args:
      freeze: 'backbone', or the number of stages, from the first one, that stay; with them stays
        what is before, such as the stem.
      image_size: side of the images in px.
      graphdef, params, batch_stats: the network, arrays or their shapes.

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
                f'config.freeze={freeze}: the network has {len(stages)} stages; give a number up '
                'to that, or config.freeze=backbone'
            )
        return stages[count - 1]

    return _used(end_of_stage, params, batch_stats)[0]


def _used(function, *trees: PyTree) -> tuple[PyTree, ...]:
    """True for the leaves of its arguments that the result of a function depends on."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
    traced = jax.make_jaxpr(function)(*shapes).jaxpr
    needed = set(traced.outvars)
    for equation in reversed(traced.eqns):
        if needed.intersection(equation.outvars):
            needed.update(each for each in equation.invars if isinstance(each, Var))
    leaves = [each in needed for each in traced.invars]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def with_frozen_statistics(
    graphdef: Any, params: PyTree, batch_stats: PyTree, frozen: PyTree
) -> Any:
    """The network's graph, whose batch norms with frozen parameters keep their statistics."""
    model, layers = nnx.merge(graphdef, params, batch_stats), _layers(frozen)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, BatchNorm) and path in layers:
            layer.frozen = True
    return nnx.graphdef(model)


def with_frozen(statistics: PyTree, stored: PyTree, frozen: PyTree) -> PyTree:
    """The statistics, with the stored ones in frozen layers."""
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


def held(params: PyTree, frozen: PyTree) -> PyTree:
    """The parameters, of which the frozen ones get no gradient, so that none is computed."""
    return jax.tree.map(
        lambda leaf, stays: jax.lax.stop_gradient(leaf) if stays else leaf, params, frozen
    )


def without_frozen(
    tx: optax.GradientTransformation, frozen: PyTree
) -> optax.GradientTransformation:
    """The optimiser of the other parameters alone: no update, decay or state for frozen ones."""
    labels = jax.tree.map(lambda stays: 'frozen' if stays else 'trained', frozen)
    return optax.multi_transform({'frozen': optax.set_to_zero(), 'trained': tx}, labels)
