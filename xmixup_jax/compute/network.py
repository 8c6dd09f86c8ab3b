"""The network of a run: `models` with what the method and the configuration ask for."""

from functools import partial
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.devices import device_groups
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import method_of, options_of
from xmixup_jax.models import create_head, create_model
from xmixup_jax.models.normalization import BATCH_NORMS

PyTree = Any


def create_network(config: ConfigDict, sizes: Sizes) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """`models.create_model` for a run: (graphdef, params, batch_stats), random.

    Args:
      config: of the experiment.
      sizes: numbers of classes, which the width of the head depends on.
    """
    return create_model(**_drawn(config, sizes), precision=config.precision, remat=config.remat)


def create_network_head(config: ConfigDict, sizes: Sizes) -> PyTree:
    """The head of `create_network` alone, where weights fill the rest."""
    return create_head(**_drawn(config, sizes))


def _drawn(config: ConfigDict, sizes: Sizes) -> dict[str, Any]:
    """The arguments of `create_model` that decide what it draws."""
    method, options = method_of(config), options_of(config)
    norm = method.norm(options) if method.norm else BATCH_NORMS[config.batch_norm]
    return {
        'config': config.model,
        'num_logits': sizes.target + method.extra_logits(options, sizes),
        'image_size': config.image_size,
        'seed': config.seed,
        'norm': partial(norm, groups=device_groups(config.batch_norm_over)),
        'head_init': config.head_init,
    }
