"""Inception-v3 (Szegedy et al., CVPR 2016, https://arxiv.org/abs/1512.00567).

Attribute names are those of torchvision and timm, so a parameter's path is its key there. The
auxiliary classifier is for training from scratch, and left out. Images are usually 299 px, at least
75 px.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import nnx

from xmixup_jax.models.base import Outputs, apply_hook, at_least_float32, conv, run_block

MIN_SIZE = 75


class BasicConv2d(nnx.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, inputs, outputs, kernel, norm, rngs, stride=1, padding=0):
        self.conv = conv(inputs, outputs, kernel, stride, rngs, padding=padding)
        self.bn = norm(outputs, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x), act='relu')


def _pool(x):
    """3x3 average pooling at stride 1; as in PyTorch, the zero padding counts."""
    return nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))


def _max_pool(x):
    return nnx.max_pool(x, (3, 3), (2, 2))


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nnx.Module):
    """Branches: 1x1 convolution, 5x5, two 3x3, and pooling (figure 5 of the paper)."""

    def __init__(self, inputs, pooled, make):
        self.branch1x1 = make(inputs, 64, 1)
        self.branch5x5_1 = make(inputs, 48, 1)
        self.branch5x5_2 = make(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = make(inputs, 64, 1)
        self.branch3x3dbl_2 = make(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = make(96, 96, 3, padding=1)
        self.branch_pool = make(inputs, pooled, 1)

    def __call__(self, x):
        return _join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_pool(x)),
        )


class InceptionB(nnx.Module):
    """Halves the map. Branches: 3x3 convolution, two 3x3, and pooling."""

    def __init__(self, inputs, make):
        self.branch3x3 = make(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = make(inputs, 64, 1)
        self.branch3x3dbl_2 = make(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = make(96, 96, 3, stride=2)

    def __call__(self, x):
        return _join(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            _max_pool(x),
        )


class InceptionC(nnx.Module):
    """Branches: 1x1 convolution, factorised 7x7, two factorised 7x7, and pooling (figure 6)."""

    def __init__(self, inputs, width, make):
        row = {'kernel': (1, 7), 'padding': (0, 3)}
        column = {'kernel': (7, 1), 'padding': (3, 0)}
        self.branch1x1 = make(inputs, 192, 1)
        self.branch7x7_1 = make(inputs, width, 1)
        self.branch7x7_2 = make(width, width, **row)
        self.branch7x7_3 = make(width, 192, **column)
        self.branch7x7dbl_1 = make(inputs, width, 1)
        self.branch7x7dbl_2 = make(width, width, **column)
        self.branch7x7dbl_3 = make(width, width, **row)
        self.branch7x7dbl_4 = make(width, width, **column)
        self.branch7x7dbl_5 = make(width, 192, **row)
        self.branch_pool = make(inputs, 192, 1)

    def __call__(self, x):
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))
        return _join(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(double),
            self.branch_pool(_pool(x)),
        )


class InceptionD(nnx.Module):
    """Halves the map. Branches: 3x3 convolution, factorised 7x7 and 3x3, and pooling."""

    def __init__(self, inputs, make):
        self.branch3x3_1 = make(inputs, 192, 1)
        self.branch3x3_2 = make(192, 320, 3, stride=2)
        self.branch7x7x3_1 = make(inputs, 192, 1)
        self.branch7x7x3_2 = make(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = make(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = make(192, 192, 3, stride=2)

    def __call__(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _join(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), _max_pool(x))


class InceptionE(nnx.Module):
    """Branches: 1x1 convolution, 1x3 beside 3x1 (twice), and pooling (figure 7)."""

    def __init__(self, inputs, make):
        row = {'kernel': (1, 3), 'padding': (0, 1)}
        column = {'kernel': (3, 1), 'padding': (1, 0)}
        self.branch1x1 = make(inputs, 320, 1)
        self.branch3x3_1 = make(inputs, 384, 1)
        self.branch3x3_2a = make(384, 384, **row)
        self.branch3x3_2b = make(384, 384, **column)
        self.branch3x3dbl_1 = make(inputs, 448, 1)
        self.branch3x3dbl_2 = make(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = make(384, 384, **row)
        self.branch3x3dbl_3b = make(384, 384, **column)
        self.branch_pool = make(inputs, 192, 1)

    def __call__(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(_pool(x)),
        )


class InceptionV3(nnx.Module):
    """A stem of plain convolutions, eleven Inception blocks, global average pooling, a head."""

    def __init__(self, num_logits: int, norm: Callable[..., nnx.Module], rngs: nnx.Rngs):
        norm = partial(norm, epsilon=1e-3)
        make = partial(BasicConv2d, norm=norm, rngs=rngs)
        self.Conv2d_1a_3x3 = make(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = make(32, 32, 3)
        self.Conv2d_2b_3x3 = make(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = make(64, 80, 1)
        self.Conv2d_4a_3x3 = make(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32, make)
        self.Mixed_5c = InceptionA(256, 64, make)
        self.Mixed_5d = InceptionA(288, 64, make)
        self.Mixed_6a = InceptionB(288, make)
        self.Mixed_6b = InceptionC(768, 128, make)
        self.Mixed_6c = InceptionC(768, 160, make)
        self.Mixed_6d = InceptionC(768, 160, make)
        self.Mixed_6e = InceptionC(768, 192, make)
        self.Mixed_7a = InceptionD(768, make)
        self.Mixed_7b = InceptionE(1280, make)
        self.Mixed_7c = InceptionE(2048, make)
        self.remat = False
        self.fc = nnx.Linear(2048, num_logits, rngs=rngs)

    def __call__(self, x, hook=None) -> Outputs:
        """Maps normalised images, float32 [B, H, W, 3], to `Outputs` with five stages."""
        parts = (
            (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3),
            (_max_pool, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3),
            (_max_pool, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d),
            (self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        )
        stages: list = []
        convs: list = []
        for part in parts:
            for layer in part:
                x = run_block(layer, x, self.remat and isinstance(layer, nnx.Module))
            x = apply_hook(x, hook, len(stages), 'conv')
            convs.append(x)
            x = apply_hook(x, hook, len(stages), 'end')
            stages.append(x)
        features = jnp.mean(at_least_float32(x), axis=(1, 2))
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))
