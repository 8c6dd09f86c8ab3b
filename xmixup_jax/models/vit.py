"""Vision transformers, in timm's layout: ViT, DINOv2 and the image towers of CLIP.

ViT: Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929. DINOv2: Oquab et al., TMLR
2024, https://arxiv.org/abs/2304.07193; with registers: Darcet et al., ICLR 2024,
https://arxiv.org/abs/2309.16588. CLIP: Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020.
Attribute names are those of timm's `vit_small_patch16_224`, so a parameter's path is its key in
timm's files, except for the head (`fc` here). There are no batch statistics.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmixup_jax.models.base import Mlp, Outputs, apply_hook, exact_gelu, rename_key, run_block


class Variant(NamedTuple):
    """The properties in which networks of this family differ."""

    width: int
    heads: int
    depth: int = 12
    patch: int = 16
    """Side of a patch, px."""
    epsilon: float = 1e-6
    """Of the layer norms."""
    layer_scale: bool = False
    """Whether the outputs of attention and MLP are scaled for each channel."""
    registers: int = 0
    """Number of register tokens. In networks with registers, they and the class token have no
    position embeddings."""
    pre_norm: bool = False
    """Layer norm before the blocks, and a patch embedding without bias."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) in place of GELU, as OpenAI's weights need it."""


_TI, _S, _B = Variant(192, 3), Variant(384, 6), Variant(768, 12)
_L = Variant(1024, 16, depth=24)
_PLAIN = {
    'vit_ti16': _TI,
    'vit_s16': _S,
    'vit_b16': _B,
    'vit_l16': _L,
    'vit_s32': _S._replace(patch=32),
    'vit_b32': _B._replace(patch=32),
}
DINOV2 = {
    f'dinov2_{size}14{ending}': base._replace(patch=14, layer_scale=True, registers=registers)
    for ending, registers in (('', 0), ('_reg4', 4))
    for size, base in (('s', _S), ('b', _B), ('l', _L))
}
CLIP = {
    f'clip_{size}{patch}{ending}': base._replace(
        patch=patch, epsilon=1e-5, pre_norm=True, quick_gelu=quick
    )
    for ending, quick in (('', False), ('_quickgelu', True))
    for size, patch, base in (('b', 16, _B), ('b', 32, _B), ('l', 14, _L))
}
VARIANTS = _PLAIN | DINOV2 | CLIP
_STAGES = 4  # with the same number of blocks each


class PatchEmbed(nnx.Module):
    """A linear map of patches of `side` x `side` pixels."""

    def __init__(self, width, side, use_bias, rngs):
        self.proj = nnx.Conv(
            3, width, (side, side), strides=side, padding='VALID', use_bias=use_bias, rngs=rngs
        )


class Attention(nnx.Module):
    """Multi-head self-attention over tokens [B, N, width]."""

    def __init__(self, width, heads, rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(y.reshape(x.shape))


class LayerScale(nnx.Module):
    """A learnt factor for each channel."""

    def __init__(self, width):
        self.gamma = nnx.Param(jnp.full(width, 1e-5))

    def __call__(self, x):
        return self.gamma[...].astype(x.dtype) * x


def _quick_gelu(x):
    return x * nnx.sigmoid(1.702 * x)


class Block(nnx.Module):
    """A transformer block: attention, then MLP, each with a layer norm before it and a shortcut."""

    def __init__(self, variant: Variant, rngs):
        width, epsilon = variant.width, variant.epsilon
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.attn = Attention(width, variant.heads, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = Mlp(width, rngs, _quick_gelu if variant.quick_gelu else exact_gelu)
        self.scaled = variant.layer_scale
        if self.scaled:
            self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def __call__(self, x):
        y = self.attn(self.norm1(x))
        x = x + (self.ls1(y) if self.scaled else y)
        y = self.mlp(self.norm2(x))
        return x + (self.ls2(y) if self.scaled else y)


class VisionTransformer(nnx.Module):
    """A vision transformer; the features are its class token after the last layer norm.

    Position embeddings are learnt for one `image_size`; see `resize_positions`.
    """

    def __init__(self, name: str, num_logits: int, image_size: int, rngs: nnx.Rngs):
        self.variant = variant = VARIANTS[name]
        width = variant.width
        patches = (image_size // variant.patch) ** 2
        placed = patches if variant.registers else 1 + patches
        normal = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, placed, width)))
        if variant.registers:
            self.reg_token = nnx.Param(normal(rngs.params(), (1, variant.registers, width)))
        self.patch_embed = PatchEmbed(width, variant.patch, not variant.pre_norm, rngs)
        if variant.pre_norm:
            self.norm_pre = nnx.LayerNorm(width, epsilon=variant.epsilon, rngs=rngs)
        self.blocks = nnx.List([Block(variant, rngs) for _ in range(variant.depth)])
        self.norm = nnx.LayerNorm(width, epsilon=variant.epsilon, rngs=rngs)
        self.remat = False
        self.fc = nnx.Linear(width, num_logits, rngs=rngs)

    def embed(self, x):
        """Maps patches [B, h, w, width] to tokens [B, n, width]: class, registers, patches."""

        batch, _, _, width = x.shape

        def broadcast(param):
            return jnp.broadcast_to(param[...].astype(x.dtype), (batch, *param.shape[1:]))

        positions = self.pos_embed[...].astype(x.dtype)
        token, patches = broadcast(self.cls_token), x.reshape(batch, -1, width)
        if self.variant.registers:
            tokens = [token, broadcast(self.reg_token), patches + positions]
            return jnp.concatenate(tokens, axis=1)
        return jnp.concatenate([token, patches], axis=1) + positions

    def __call__(self, x, hook=None) -> Outputs:
        """Maps normalised images, float32 [B, H, W, 3], to `Outputs`.

        Its four stages are maps of the patch tokens. `hook` gets all tokens, [B, n, width].
        """
        x = self.patch_embed.proj(x)
        _, height, width, channels = x.shape
        x = self.embed(x)
        if self.variant.pre_norm:
            x = self.norm_pre(x).astype(x.dtype)
        first = 1 + self.variant.registers  # position of the first patch
        stages: list = []
        convs: list = []
        for i, block in enumerate(self.blocks, 1):
            x = run_block(block, x, self.remat)
            if i % (len(self.blocks) // _STAGES) == 0:
                for place, kept in (('conv', convs), ('end', stages)):
                    x = apply_hook(x, hook, len(stages), place)
                    kept.append(x[:, first:].reshape(-1, height, width, channels))
        features = self.norm(x[:, 0])
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))


def resize_positions(
    positions: jax.Array | np.ndarray, shape: tuple[int, ...]
) -> jax.Array | np.ndarray:
    """Resizes learnt position embeddings to another number of patches, with bicubic interpolation.

    See the ViT paper, section 3.2.

    Args:
      positions: [1, n, D] for the patches, or [1, 1 + n, D] for class token and patches.
      shape: of the result, with or without the class token as in `positions`.

    Returns:
      the resized embeddings; `positions` itself if it already has the shape, or if either number of
      patches is not a square.
    """
    counts = positions.shape[1], shape[1]
    first = 0 if all(_side(count) for count in counts) else 1  # position of the first patch
    old, new = (_side(count - first) for count in counts)
    if old == new or not (old and new):
        return positions
    grid = positions[:, first:].reshape(1, old, old, -1)
    grid = jax.image.resize(grid, (1, new, new, grid.shape[-1]), 'bicubic')
    return jnp.concatenate([positions[:, :first], grid.reshape(1, new * new, -1)], axis=1)


def _side(count: int) -> int:
    """The side of a square of `count` patches; 0 if `count` is not a square."""
    side = math.isqrt(count)
    return side if side**2 == count else 0


_TORCHVISION = (
    (r'class_token', 'cls_token'),
    (r'conv_proj\.(.*)', r'patch_embed.proj.\1'),
    (r'encoder\.pos_embedding', 'pos_embed'),
    (r'encoder\.ln\.(.*)', r'norm.\1'),
    (r'heads\.head\.(.*)', r'head.\1'),
    (r'encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.(.*)', r'blocks.\1.norm\2.\3'),
    (r'(.*encoder_layer_)(\d+)\.self_attention\.in_proj_(.*)', r'blocks.\2.attn.qkv.\3'),
    (r'(.*encoder_layer_)(\d+)\.self_attention\.out_proj\.(.*)', r'blocks.\2.attn.proj.\3'),
    (r'(.*encoder_layer_)(\d+)\.mlp\.(?:0|linear_1)\.(.*)', r'blocks.\2.mlp.fc1.\3'),
    (r'(.*encoder_layer_)(\d+)\.mlp\.(?:3|linear_2)\.(.*)', r'blocks.\2.mlp.fc2.\3'),
)


_OPENAI = (
    (r'class_embedding', 'cls_token'),
    (r'positional_embedding', 'pos_embed'),
    (r'conv1\.(.*)', r'patch_embed.proj.\1'),
    (r'ln_pre\.(.*)', r'norm_pre.\1'),
    (r'ln_post\.(.*)', r'norm.\1'),
    (r'transformer\.resblocks\.(\d+)\.ln_(\d)\.(.*)', r'blocks.\1.norm\2.\3'),
    (r'transformer\.resblocks\.(\d+)\.attn\.in_proj_(.*)', r'blocks.\1.attn.qkv.\2'),
    (r'transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.*)', r'blocks.\1.attn.proj.\2'),
    (r'transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.*)', r'blocks.\1.mlp.fc1.\2'),
    (r'transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.*)', r'blocks.\1.mlp.fc2.\2'),
)


def timm_key(name: str, key: str) -> str:
    """Renames keys of torchvision's `vit_b_16`, OpenAI's and OpenCLIP's CLIP to timm's layout.

    Keys of CLIP come without their prefix `visual.`. Other keys are returned as they are.
    """
    return rename_key(key, _OPENAI if VARIANTS[name].pre_norm else _TORCHVISION) or key
