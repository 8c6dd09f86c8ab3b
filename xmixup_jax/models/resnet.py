"""ResNet v1.5 and ResNet-D, in the layouts of torchvision and timm.

ResNet: He et al., CVPR 2016, https://arxiv.org/abs/1512.03385; v1.5 has the stride in the 3x3
convolution of a bottleneck. ResNet-D: He et al., "Bag of Tricks for Image Classification with
CNNs", CVPR 2019, https://arxiv.org/abs/1812.01187, figure 2c. Attribute names are those of
torchvision (`conv1`, `bn1`, `layer1`, ..., `fc`), for ResNet-D those of timm, so a parameter's path
is its key in a PyTorch state dict (see `weights.files`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from flax import nnx
from jax import numpy as jnp

from xmixup_jax.models.base import Outputs, apply_hook, at_least_float32, conv, run_block
from xmixup_jax.models.normalization import BatchNorm
from xmixup_jax.models.pooling import max_pool


class Variant(NamedTuple):
    """The properties in which networks of this family differ."""

    depths: tuple[int, ...]
    """Number of blocks in each stage."""
    bottleneck: bool
    deep: bool = False
    """ResNet-D: a stem of three 3x3 convolutions, and average pooling before the projection in
    shortcuts that halve the map."""


DEPTHS = {
    'resnet10': Variant((1, 1, 1, 1), False),
    'resnet18': Variant((2, 2, 2, 2), False),
    'resnet34': Variant((3, 4, 6, 3), False),
    'resnet50': Variant((3, 4, 6, 3), True),
    'resnet101': Variant((3, 4, 23, 3), True),
}
DEPTHS |= {
    f'{name}d': DEPTHS[name]._replace(deep=True)
    for name in ('resnet18', 'resnet34', 'resnet50', 'resnet101')
}
# Kernel (ResNet-D: always 3) and stride of the first convolution, and whether max pooling follows.
STEMS = {'imagenet': (7, 2, True), 'tiny': (3, 2, False), 'cifar': (3, 1, False)}


def _halved(x):
    """2x2 average pooling; at an odd border only the pixels inside count."""
    return nnx.avg_pool(x, (2, 2), strides=(2, 2), padding='SAME', count_include_pad=False)


def _same(x):
    return x


def _deep_stem(width, stride, norm, rngs):
    """Three 3x3 convolutions, the first two with half the width; `bn1` follows the last.

    A position is left free for each ReLU, as in timm's keys.
    """
    half = (width + 1) // 2
    return nnx.List(
        [
            *(conv(3, half, 3, stride, rngs), norm(half, rngs=rngs), _same),
            *(conv(half, half, 3, 1, rngs), norm(half, rngs=rngs), _same),
            conv(half, width, 3, 1, rngs),
        ]
    )


class Block(nnx.Module):
    """A residual block of two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1."""

    def __init__(self, inputs, width, stride, variant, norm, rngs):
        bottleneck = variant.bottleneck
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            self.conv1 = conv(inputs, width, 1, 1, rngs)
            self.conv2 = conv(width, width, 3, stride, rngs)
            self.conv3 = conv(width, outputs, 1, 1, rngs)
            self.bn3 = norm(outputs, rngs=rngs)
        else:
            self.conv1 = conv(inputs, width, 3, stride, rngs)
            self.conv2 = conv(width, width, 3, 1, rngs)
        self.bn1 = norm(width, rngs=rngs)
        self.bn2 = norm(width, rngs=rngs)
        if stride != 1 or inputs != outputs:
            pool = [_halved if stride == 2 else _same] if variant.deep else []
            stride = 1 if variant.deep else stride
            project = conv(inputs, outputs, 1, stride, rngs)
            self.downsample = nnx.List([*pool, project, norm(outputs, rngs=rngs)])
        self.bottleneck = bottleneck

    def __call__(self, x, hook=lambda x: x):
        """Returns (output of the block, output of its last convolution after `hook`)."""
        y = self.bn1(self.conv1(x), act='relu')
        y = self.conv2(y)
        if self.bottleneck:
            y = self.conv3(self.bn2(y, act='relu'))
        last = hook(y)
        if hasattr(self, 'downsample'):
            for layer in self.downsample:
                x = layer(x)
        return (self.bn3 if self.bottleneck else self.bn2)(last, residual=x, act='relu'), last


class ResNet(nnx.Module):
    """A residual network.

    `width` is the number of channels of the first stage, 64 in the papers. The stem reduces the
    resolution by a factor of 4 (`imagenet`), 2 (`tiny`, for 64 px) or 1 (`cifar`, for 32 px).
    `norm` is `normalization.BatchNorm`, or takes the same arguments.
    """

    def __init__(
        self,
        name: str,
        num_logits: int,
        width: int,
        stem: str,
        norm: Callable[..., nnx.Module],
        rngs: nnx.Rngs,
    ):
        norm = partial(norm, epsilon=1e-5)
        variant = DEPTHS[name]
        kernel, stride, self.pooled = STEMS[stem]
        self.deep = variant.deep
        if variant.deep:
            self.conv1 = _deep_stem(width, stride, norm, rngs)
        else:
            self.conv1 = conv(3, width, kernel, stride, rngs)
        self.bn1 = norm(width, rngs=rngs)
        channels = width
        self.stages = len(variant.depths)
        for stage, depth in enumerate(variant.depths):
            stage_width = width * 2**stage
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(Block(channels, stage_width, stride, variant, norm, rngs))
                channels = stage_width * 4 if variant.bottleneck else stage_width
            setattr(self, f'layer{stage + 1}', nnx.List(blocks))
        self.remat = False  # set by `create_model`, as in all networks
        self.fc = nnx.Linear(channels, num_logits, rngs=rngs)

    def __call__(self, x, hook=None) -> Outputs:
        """Maps normalised images, float32 [B, H, W, 3], to `Outputs`.

        `hook` is as in `models.forward`.
        """
        for layer in self.conv1 if self.deep else (self.conv1,):
            x = layer(x, act='relu') if isinstance(layer, BatchNorm) else layer(x)
        x = self.bn1(x, act='relu')
        if self.pooled:
            x = max_pool(x, 3, 2, 1)
        stages, convs = [], []
        for i in range(self.stages):
            *blocks, last_block = getattr(self, f'layer{i + 1}')
            for block in blocks:
                x, _ = run_block(block, x, self.remat)
            x, last = run_block(
                last_block, x, self.remat, partial(apply_hook, hook=hook, stage=i, place='conv')
            )
            x = apply_hook(x, hook, i, 'end')
            stages.append(x)
            convs.append(last)
        features = jnp.mean(at_least_float32(x), axis=(1, 2))
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))
