"""Backbones, as plain pytrees for the training step."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.devices import chosen_precision
from xmixup_jax.models import convnext, efficientnet_lite, inception, resnet, vit
from xmixup_jax.models.base import Keys, Outputs, at_least_float32, draw_head
from xmixup_jax.models.normalization import BatchNorm

__all__ = [
    'MODELS',
    'Architecture',
    'BatchNorm',
    'Outputs',
    'create_head',
    'create_model',
    'forward',
    'module',
]

Params = dict[str, Any]


def _same_key(name: str, key: str) -> str:
    del name
    return key


# Mean and standard deviation of the RGB channels, as in torchvision and timm. 'inception' maps to
# the range from -1 to 1, as TensorFlow's Inception and many later networks do.
NORMALIZATIONS = {
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'inception': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class Architecture(NamedTuple):
    """Properties of a backbone other than its layers."""

    head: str = 'fc'
    """Name of the head in timm's layout."""
    timm_key: Callable[[str, str], str] = _same_key
    """Maps (config.model.name, key in a weights file) to the key in timm's layout."""
    normalization: str = 'imagenet'
    """The key in `NORMALIZATIONS` that timm's weights were trained with."""
    optional: tuple[str, ...] = ()
    """Prefixes of keys that weights files may have, but this network does not."""
    towers: tuple[str, ...] = ()
    """Prefixes of this network's keys in files that contain a second network."""
    min_size: int = 1
    """Smallest side of the images, px."""
    multiple: int = 1
    """The side of the images must be a multiple of this, px."""
    has_batch_norm: bool = True
    scalable: bool = False
    """Whether config.model.width and config.model.stem apply."""


_LITE = Architecture('classifier', efficientnet_lite.timm_key, 'inception')
_CONVNEXT = Architecture(
    'head.fc', convnext.timm_key, has_batch_norm=False, min_size=convnext.MIN_SIZE
)


def _vit(name: str) -> Architecture:
    """The architecture of a ViT, a DINOv2 network or a CLIP image tower."""
    side = vit.VARIANTS[name].patch
    common = Architecture(
        'head', vit.timm_key, 'inception', min_size=side, multiple=side, has_batch_norm=False
    )
    if name in vit.DINOV2:
        return common._replace(normalization='imagenet', optional=('mask_token',))
    if name in vit.CLIP:
        optional, towers = ('proj', 'embeddings.position_ids'), ('visual', 'vision_model')
        return common._replace(normalization='clip', optional=optional, towers=towers)
    return common


MODELS = {
    **dict.fromkeys(resnet.DEPTHS, Architecture(scalable=True)),
    **dict.fromkeys(efficientnet_lite.SCALES, _LITE),
    'inception_v3': Architecture(
        normalization='inception', optional=('AuxLogits.',), min_size=inception.MIN_SIZE
    ),
    **dict.fromkeys(convnext.SIZES, _CONVNEXT),
    **{name: _vit(name) for name in vit.VARIANTS},
}


Backbone = (
    vit.VisionTransformer
    | convnext.ConvNeXt
    | inception.InceptionV3
    | efficientnet_lite.EfficientNetLite
    | resnet.ResNet
)


def module(
    config: ConfigDict,
    num_logits: int,
    image_size: int,
    norm: Callable[..., nnx.Module],
    rngs: nnx.Rngs,
) -> Backbone:
    """Makes the network that `config`, the `model` part of the configuration, names."""
    name = config.name
    if name in vit.VARIANTS:
        return vit.VisionTransformer(name, num_logits, image_size, rngs)
    if name in convnext.SIZES:
        return convnext.ConvNeXt(name, num_logits, rngs)
    if name == 'inception_v3':
        return inception.InceptionV3(num_logits, norm, rngs)
    if name in efficientnet_lite.SCALES:
        return efficientnet_lite.EfficientNetLite(name, num_logits, norm, rngs)
    return resnet.ResNet(name, num_logits, config.width, config.stem, norm, rngs)


def create_model(
    config: ConfigDict,
    num_logits: int,
    image_size: int,
    seed: int,
    norm: Callable[..., nnx.Module] = BatchNorm,
    precision: str = 'float32',
    remat: bool = False,
    head_init: str = 'uniform',
) -> tuple[nnx.GraphDef, Params, Params]:
    """Makes a network with random parameters.

    Args:
      config: the `model` part of the configuration.
      num_logits: width of the head.
      image_size: side of the images in px; only vision transformers depend on it.
      seed: for the parameters.
      norm: constructor of the normalisation layers, with the arguments of `BatchNorm`.
      precision: one of `devices.PRECISIONS`, of convolutions, matrix products and activations. The
        head, normalisation, parameters and statistics are always float32.
      remat: store only the inputs of each block, and recompute the rest in the backward pass.
      head_init: distribution of the head's parameters, see `draw_head`.

    Returns:
      (graphdef, params, batch_stats); the last two are nested dicts of float32 arrays. The head
      is params['fc'] in every network.
    """
    rngs = cast(nnx.Rngs, Keys(seed))
    model = module(config, num_logits, image_size, norm, rngs)
    fc = model.fc
    assert fc.bias is not None  # every network has one
    head = draw_head(rngs.params(), fc.in_features, num_logits, head_init)
    fc.kernel[...], fc.bias[...] = head['kernel'], head['bias']
    model.remat = remat
    precision = chosen_precision(precision)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear) and layer is not fc:
            layer.dtype = precision if precision != 'float32' else None
    graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, batch_stats = map(nnx.to_pure_dict, states)
    return graphdef, params, batch_stats


def create_head(
    config: ConfigDict,
    num_logits: int,
    image_size: int,
    seed: int,
    norm: Callable[..., nnx.Module] = BatchNorm,
    head_init: str = 'uniform',
) -> Params:
    """Draws the head that `create_model` draws with the same arguments, and nothing else.

    The parameters of a whole network are drawn by about a hundred small programs, whose compilation
    takes seconds. They are not needed where weights fill the network.

    Returns:
      {'kernel' float32 [D, K], 'bias' float32 [K]}.
    """
    rngs = cast(nnx.Rngs, Keys(seed))
    # Only counts the keys that the rest of the network takes.
    model = nnx.eval_shape(lambda: module(config, num_logits, image_size, norm, rngs))
    return draw_head(rngs.params(), model.fc.in_features, num_logits, head_init)


def forward(
    graphdef, params, batch_stats, images, *, train: bool, key=None, hook=None
) -> tuple[Outputs, Params]:
    """Runs the network.

    Args:
      graphdef, params, batch_stats: as `create_model` returns them.
      images: float32 [B, H, W, 3], normalised.
      train: whether batch norm uses and updates the statistics of the batch; needs a mapped axis
        named 'batch'.
      key: a random key, for layers that are random in training.
      hook: changes feature maps inside the network, see `base.Hook`.

    Returns:
      (outputs, batch_stats): the latter updated if `train`.
    """
    model = nnx.merge(graphdef, params, batch_stats)
    model.train() if train else model.eval()
    for _, layer in nnx.iter_modules(model):
        if getattr(layer, 'frozen', False):
            layer.eval()
    if train and key is not None:
        for i, (_, layer) in enumerate(nnx.iter_modules(model)):
            if hasattr(layer, 'key'):
                layer.key = jax.random.fold_in(key, i)
    outputs = model(images, hook)
    return jax.tree.map(at_least_float32, outputs), nnx.to_pure_dict(
        nnx.state(model, nnx.BatchStat)
    )
