"""ConvNeXt-T, S and B (Liu et al., CVPR 2022, https://arxiv.org/abs/2201.03545), in timm's layout.

Attribute names are those of timm's `convnext_tiny`, so a parameter's path is its key in timm's
files, except for the linear layer of the head (`head.fc` in timm, `fc` here). There are no batch
statistics. The paper's stochastic depth is for training from scratch, and left out.
"""

import re

import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.base import Mlp, Outputs, apply_hook, at_least_float32, rename_key, run_block
from xmixup_jax.models.cpu import DepthwiseConv, convolution

# Blocks in each stage, and the first stage's width, which doubles from stage to stage.
SIZES = {
    'convnext_tiny': ((3, 3, 9, 3), 96),
    'convnext_small': ((3, 3, 27, 3), 96),
    'convnext_base': ((3, 3, 27, 3), 128),
}
MIN_SIZE = 32  # px; the last feature map then has one pixel
_LAYER_SCALE = 1e-6  # initial value


def _norm(width, rngs):
    return nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)


def _patches(inputs, outputs, side, rngs):
    """A linear map of patches of `side` x `side` pixels."""
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        strides=side,
        padding='VALID',
        conv_general_dilated=convolution,
        rngs=rngs,
    )


class Block(nnx.Module):
    """A residual block: depthwise 7x7 convolution, norm, MLP, and a scale for each channel."""

    def __init__(self, width, rngs):
        self.conv_dw = DepthwiseConv(width, 7, 1, rngs, use_bias=True)
        self.norm = _norm(width, rngs)
        self.mlp = Mlp(width, rngs)
        self.gamma = nnx.Param(jnp.full(width, _LAYER_SCALE))

    def __call__(self, x):
        y = self.mlp(self.norm(self.conv_dw(x)))
        return x + self.gamma[...].astype(y.dtype) * y


class Stage(nnx.Module):
    """Residual blocks; all stages but the first begin with a norm and a 2x2 convolution."""

    def __init__(self, inputs, width, depth, rngs):
        if inputs != width:
            self.downsample = nnx.List([_norm(inputs, rngs), _patches(inputs, width, 2, rngs)])
        self.shrinks = inputs != width
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])

    def __call__(self, x, remat):
        if self.shrinks:
            norm, shrink = self.downsample
            x = shrink(norm(x))
        for block in self.blocks:
            x = run_block(block, x, remat)
        return x


class HeadNorm(nnx.Module):
    """The norm between pooling and the linear layer."""

    def __init__(self, width, rngs):
        self.norm = _norm(width, rngs)


class ConvNeXt(nnx.Module):
    """A stem of 4x4 patches, four stages, global average pooling, norm and head."""

    def __init__(self, name: str, num_logits: int, rngs: nnx.Rngs):
        depths, first = SIZES[name]
        widths = [first * 2**i for i in range(len(depths))]
        self.stem = nnx.List([_patches(3, first, 4, rngs), _norm(first, rngs)])
        self.stages = nnx.List(
            [
                Stage(inputs, width, depth, rngs)
                for inputs, width, depth in zip([first, *widths], widths, depths, strict=False)
            ]
        )
        self.head = HeadNorm(widths[-1], rngs)
        self.remat = False
        self.fc = nnx.Linear(widths[-1], num_logits, rngs=rngs)

    def __call__(self, x, hook=None) -> Outputs:
        """Maps normalised images, float32 [B, H, W, 3], to `Outputs` with four stages."""
        embed, norm = self.stem
        x = embed(x)
        x = norm(x).astype(x.dtype)
        stages: list = []
        convs: list = []
        for i, stage in enumerate(self.stages):
            x = stage(x, self.remat)
            for place, kept in (('conv', convs), ('end', stages)):
                x = apply_hook(x, hook, i, place)
                kept.append(x)
        features = self.head.norm(jnp.mean(at_least_float32(x), axis=(1, 2)))
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))


_OTHERS = (
    # torchvision's `convnext_tiny`, with its parts renumbered by `timm_key`.
    (r'features\.0\.([01])\.(weight|bias)', r'stem.\1.\2'),
    (r'features\.(\d)\.([01])\.(weight|bias)', r'stages.\1.downsample.\2.\3'),
    (r'features\.(\d)\.(\d+)\.layer_scale', r'stages.\1.blocks.\2.gamma'),
    (r'features\.(\d)\.(\d+)\.block\.0\.(.*)', r'stages.\1.blocks.\2.conv_dw.\3'),
    (r'features\.(\d)\.(\d+)\.block\.2\.(.*)', r'stages.\1.blocks.\2.norm.\3'),
    (r'features\.(\d)\.(\d+)\.block\.3\.(.*)', r'stages.\1.blocks.\2.mlp.fc1.\3'),
    (r'features\.(\d)\.(\d+)\.block\.5\.(.*)', r'stages.\1.blocks.\2.mlp.fc2.\3'),
    (r'classifier\.0\.(.*)', r'head.norm.\1'),
    (r'classifier\.2\.(.*)', r'head.fc.\1'),
    # The authors' code (https://github.com/facebookresearch/ConvNeXt).
    (r'downsample_layers\.0\.(.*)', r'stem.\1'),
    (r'downsample_layers\.(\d)\.(.*)', r'stages.\1.downsample.\2'),
    (r'stages\.(\d)\.(\d+)\.gamma', r'stages.\1.blocks.\2.gamma'),
    (r'stages\.(\d)\.(\d+)\.dwconv\.(.*)', r'stages.\1.blocks.\2.conv_dw.\3'),
    (r'stages\.(\d)\.(\d+)\.norm\.(.*)', r'stages.\1.blocks.\2.norm.\3'),
    (r'stages\.(\d)\.(\d+)\.pwconv(\d)\.(.*)', r'stages.\1.blocks.\2.mlp.fc\3.\4'),
    (r'norm\.(.*)', r'head.norm.\1'),
    (r'head\.(weight|bias)', r'head.fc.\1'),
)


def timm_key(name: str, key: str) -> str:
    """Renames keys of torchvision's `convnext_tiny` and of the authors' code to timm's layout.

    torchvision's `features` are the stem, then alternately the blocks of a stage and the
    downsampling before the next one. Other keys are returned as they are.
    """
    del name
    key = re.sub(r'^features\.([1-7])\.', lambda part: f'features.{int(part[1]) // 2}.', key)
    return rename_key(key, _OTHERS) or key
