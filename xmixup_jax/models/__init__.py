"""Backbones, and the plain pytrees that the training step works on."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.models.base import Outputs
from xmixup_jax.models.resnet import DEPTHS, STEMS, ResNet

__all__ = ['DEPTHS', 'STEMS', 'Outputs', 'create_model', 'forward']

Params = dict[str, Any]


def create_model(
    config: ConfigDict,
    num_logits: int,
    seed: int,
    norm: Callable[..., nnx.Module] = nnx.BatchNorm,
) -> tuple[nnx.GraphDef, Params, Params]:
    """Makes a randomly initialised network.

    Args:
      config: the `model` part of the configuration: name, width, stem.
      num_logits: width of the head.
      seed: of the initialisation.
      norm: constructor of the normalisation layers, with nnx.BatchNorm's arguments.

    Returns:
      (graphdef, params, batch_stats); the last two are nested dicts of float32 arrays.
    """
    model = ResNet(config.name, num_logits, config.width, config.stem, norm, nnx.Rngs(seed))
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def forward(
    graphdef, params, batch_stats, images, *, train: bool, key=None, scales=None
) -> tuple[Outputs, Params]:
    """Runs the network; with `train` on batch statistics, under a mapped axis named 'batch'.

    Args:
      images: float32 [B, H, W, 3], normalised.
      key: for layers that are random in training.
      scales: factors for the channels at the end of each stage, [C] each.

    Returns:
      (outputs, batch_stats after this batch).
    """
    model = nnx.merge(graphdef, params, batch_stats)
    model.train() if train else model.eval()
    if train and key is not None:
        for i, (_, layer) in enumerate(nnx.iter_modules(model)):
            if hasattr(layer, 'key'):
                layer.key = jax.random.fold_in(key, i)
    outputs = model(images, scales)
    return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
