"""Renames keys of Hugging Face's transformers to timm's layout.

It covers `vit`, `dinov2`, `dinov2_with_registers`, `clip` (the image tower), `resnet` and
`convnext` in https://github.com/huggingface/transformers, for example
`vit.encoder.layer.0.attention.attention.query.weight`. Query, key and value stay separate.
"""

import re

from xmixup_jax.models.base import rename_key
from xmixup_jax.models.convnext import SIZES
from xmixup_jax.models.resnet import DEPTHS
from xmixup_jax.models.vit import VARIANTS

# (pattern, replacement); numbers in braces are increased by one. For ViT and DINOv2:
_VIT = (
    (r'embeddings\.cls_token', 'cls_token'),
    (r'embeddings\.position_embeddings', 'pos_embed'),
    (r'embeddings\.patch_embeddings\.projection\.(.*)', r'patch_embed.proj.\1'),
    (r'encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(.*)',
     r'blocks.\1.attn.\2.\3'),
    (r'encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)', r'blocks.\1.attn.proj.\2'),
    (r'encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)', r'blocks.\1.mlp.fc1.\2'),
    (r'encoder\.layer\.(\d+)\.output\.dense\.(.*)', r'blocks.\1.mlp.fc2.\2'),
    (r'encoder\.layer\.(\d+)\.layernorm_before\.(.*)', r'blocks.\1.norm1.\2'),
    (r'encoder\.layer\.(\d+)\.layernorm_after\.(.*)', r'blocks.\1.norm2.\2'),
    (r'embeddings\.(mask_token|register_tokens)', r'\1'),
    (r'encoder\.layer\.(\d+)\.norm(\d)\.(.*)', r'blocks.\1.norm\2.\3'),
    (r'encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1', r'blocks.\1.ls\2.gamma'),
    (r'encoder\.layer\.(\d+)\.mlp\.fc(\d)\.(.*)', r'blocks.\1.mlp.fc\2.\3'),
    (r'layernorm\.(.*)', r'norm.\1'),
    (r'classifier\.(.*)', r'head.\1'),
    (r'pooler\.dense\.(.*)', r'pre_logits.\1'),
)  # fmt: skip
_CLIP = (
    (r'embeddings\.class_embedding', 'cls_token'),
    (r'embeddings\.position_embedding\.weight', 'pos_embed'),
    (r'embeddings\.patch_embedding\.weight', 'patch_embed.proj.weight'),
    (r'pre_layrnorm\.(.*)', r'norm_pre.\1'),
    (r'post_layernorm\.(.*)', r'norm.\1'),
    (r'encoder\.layers\.(\d+)\.layer_norm(\d)\.(.*)', r'blocks.\1.norm\2.\3'),
    (r'encoder\.layers\.(\d+)\.self_attn\.q_proj\.(.*)', r'blocks.\1.attn.query.\2'),
    (r'encoder\.layers\.(\d+)\.self_attn\.k_proj\.(.*)', r'blocks.\1.attn.key.\2'),
    (r'encoder\.layers\.(\d+)\.self_attn\.v_proj\.(.*)', r'blocks.\1.attn.value.\2'),
    (r'encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)', r'blocks.\1.attn.proj.\2'),
    (r'encoder\.layers\.(\d+)\.mlp\.fc(\d)\.(.*)', r'blocks.\1.mlp.fc\2.\3'),
)
_RESNET = (
    (r'embedder\.embedder\.convolution\.(.*)', r'conv1.\1'),
    (r'embedder\.embedder\.normalization\.(.*)', r'bn1.\1'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(.*)',
     r'layer{\1}.\2.downsample.0.\3'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(.*)',
     r'layer{\1}.\2.downsample.1.\3'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(.*)',
     r'layer{\1}.\2.conv{\3}.\4'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(.*)',
     r'layer{\1}.\2.bn{\3}.\4'),
    (r'classifier\.1\.(.*)', r'fc.\1'),
)  # fmt: skip
_CONVNEXT_BLOCK = (
    ('dwconv', 'conv_dw'),
    ('layernorm', 'norm'),
    ('pwconv1', 'mlp.fc1'),
    ('pwconv2', 'mlp.fc2'),
)
_CONVNEXT = (
    (r'embeddings\.patch_embeddings\.(.*)', r'stem.0.\1'),
    (r'embeddings\.layernorm\.(.*)', r'stem.1.\1'),
    (r'encoder\.stages\.(\d)\.downsampling_layer\.(.*)', r'stages.\1.downsample.\2'),
    (r'encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter',
     r'stages.\1.blocks.\2.gamma'),
    *((rf'encoder\.stages\.(\d)\.layers\.(\d+)\.{theirs}\.(.*)',
       rf'stages.\1.blocks.\2.{timms}.\3') for theirs, timms in _CONVNEXT_BLOCK),
    (r'layernorm\.(.*)', r'head.norm.\1'),
    (r'classifier\.(weight|bias)', r'head.fc.\1'),
)  # fmt: skip
_BASE = re.compile(r'(?:vit|dinov2|dinov2_with_registers|resnet|convnext)\.')


def timm_key(model: str, key: str) -> str | None:
    """Renames a key to timm's layout.

    Args:
      model: config.model.name.
      key: in transformers' layout, with or without the network's prefix (`vit.`).

    Returns:
      the key in timm's layout; None if `key` is not in transformers' layout.
    """
    base = _BASE.match(key)
    found = rename_key(key[base.end() :] if base else key, _patterns(model))
    return found and re.sub(r'\{(\d+)\}', lambda number: str(int(number[1]) + 1), found)


def _patterns(model: str) -> tuple[tuple[str, str], ...]:
    if model in VARIANTS:
        return _CLIP if VARIANTS[model].pre_norm else _VIT
    return _RESNET if model in DEPTHS else _CONVNEXT if model in SIZES else ()
