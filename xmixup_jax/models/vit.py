"""Vision transformers (Dosovitskiy et al., ICLR 2021), ViT-S/16 and ViT-B/16, in timm's layout.

Attribute names are those of timm's `vit_small_patch16_224`, so that a parameter's path is its key
there, but for the head (`fc` here). There are no batch statistics.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmixup_jax.models.base import Mlp, Outputs, at_hook, renamed, run_block

# Width and heads; both have 12 blocks.
SIZES = {'vit_s16': (384, 6), 'vit_b16': (768, 12)}
PATCH = 16
_DEPTH = 12
_STAGES = 4  # of three blocks each


class PatchEmbed(nnx.Module):
    """A linear map of each patch of PATCH x PATCH pixels."""

    def __init__(self, width, rngs):
        self.proj = nnx.Conv(3, width, (PATCH, PATCH), strides=PATCH, padding='VALID', rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention over the tokens [B, N, width]."""

    def __init__(self, width, heads, rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention and perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width, heads, rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(width, heads, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(width, rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Patches of 16 px and a class token, whose last state is the feature.

    Positions are learnt, so that the network is made for one `image_size`; see `resize_positions`.
    """

    def __init__(self, name: str, num_logits: int, image_size: int, rngs: nnx.Rngs):
        width, heads = SIZES[name]
        patches = (image_size // PATCH) ** 2
        normal = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, 1 + patches, width)))
        self.patch_embed = PatchEmbed(width, rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(_DEPTH)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.remat = False
        self.fc = nnx.Linear(width, num_logits, rngs=rngs)

    def __call__(self, x, hook=None) -> Outputs:
        """float32 [B, H, W, 3], normalised, to `Outputs` with four stages of patch tokens."""
        x = self.patch_embed.proj(x)
        batch, height, width, channels = x.shape
        token, positions = (p[...].astype(x.dtype) for p in (self.cls_token, self.pos_embed))
        token = jnp.broadcast_to(token, (batch, 1, channels))
        x = jnp.concatenate([token, x.reshape(batch, -1, channels)], axis=1) + positions
        stages: list = []
        convs: list = []
        for i, block in enumerate(self.blocks, 1):
            x = run_block(block, x, self.remat)
            if i % (_DEPTH // _STAGES) == 0:
                for place, kept in (('conv', convs), ('end', stages)):
                    x = at_hook(x, hook, len(stages), place)
                    kept.append(x[:, 1:].reshape(-1, height, width, channels))
        features = self.norm(x[:, 0])
        return Outputs(self.fc(features), features, tuple(stages), tuple(convs))


def resize_positions(
    positions: jax.Array | np.ndarray, shape: tuple[int, ...]
) -> jax.Array | np.ndarray:
    """Learnt positions [1, 1 + n, D] for another number of patches, bicubic as in the paper (3.2).

    Returns:
      `positions` itself if the shape is theirs already, or if either is not of a square image.
    """
    old, new = round((positions.shape[1] - 1) ** 0.5), round((shape[1] - 1) ** 0.5)
    if old == new or old**2 + 1 != positions.shape[1] or new**2 + 1 != shape[1]:
        return positions
    grid = positions[:, 1:].reshape(1, old, old, -1)
    grid = jax.image.resize(grid, (1, new, new, grid.shape[-1]), 'bicubic')
    return jnp.concatenate([positions[:, :1], grid.reshape(1, new * new, -1)], axis=1)


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


def timm_key(name: str, key: str) -> str:
    """A key of torchvision's `vit_b_16` in timm's layout; others as they are."""
    del name
    return renamed(key, _TORCHVISION) or key
