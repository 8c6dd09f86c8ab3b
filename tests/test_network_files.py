"""Weights files of networks other than ResNets, from other projects and from this one."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from safetensors.torch import load_file
from test_backbones import LARGE, make, randomized
from torch_networks import NAMES, SMALL, peer, timm, torchvision

from xmixup_jax.models import MODELS, NORMALIZATIONS, create_model, forward
from xmixup_jax.models.cpu import any_platform
from xmixup_jax.models.vit import resize_positions
from xmixup_jax.weights.files import save_weights, tensor_key, torch_tensors
from xmixup_jax.weights.pretrained import Weights

SIZE = 32
HEADS = {f'{name}.{leaf}' for name in ('head', 'head.fc') for leaf in ('weight', 'bias')}


def smallest(name):
    """The smallest image side in px; for a vision transformer, two patches."""
    return max(MODELS[name].min_size, 2 * MODELS[name].multiple)


def filled(path, name, *, with_head=True):
    """Reads a file into a network of this package; returns arrays by timm's keys."""
    _, params, batch_stats = make(name, SIZE)
    return torch_tensors(name, *Weights(path, name).fill(params, batch_stats, with_head=with_head))


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.numpy(), err_msg=key)


@pytest.mark.parametrize('name', SMALL)
def test_timm_loads_what_is_saved_here(name, tmp_path):
    """timm loads with strict=True, and its own file is read here."""
    shapes = make(name, SIZE)[1]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_weights(tmp_path / 'ours', name, params, {}, {})
    network = peer(name, 7, SIZE)
    network.load_state_dict(load_file(tmp_path / 'ours'), strict=True)
    torch.save(network.state_dict(), tmp_path / 'theirs')
    same(filled(tmp_path / 'theirs', name), load_file(tmp_path / 'ours'))


def to_the_authors_convnext(key):
    """timm's key as in https://github.com/facebookresearch/ConvNeXt, `models/convnext.py`."""
    if key.startswith('head.'):
        return key.removeprefix('head.').replace('fc.', 'head.')
    parts = key.split('.')
    if parts[0] == 'stem':
        return '.'.join(['downsample_layers', '0', *parts[1:]])
    if parts[2] == 'downsample':
        return '.'.join(['downsample_layers', parts[1], *parts[3:]])
    key = '.'.join(['stages', parts[1], *parts[3:]])
    return key.replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')


def test_the_authors_convnext(tmp_path):
    network = randomized(peer('convnext4', 7, SIZE))
    tensors = {to_the_authors_convnext(key): t for key, t in network.state_dict().items()}
    assert {'downsample_layers.2.1.weight', 'stages.1.1.pwconv2.bias', 'norm.bias'} < set(tensors)
    torch.save({'model': tensors}, tmp_path / 'w')
    same(filled(tmp_path / 'w', 'convnext4'), network.state_dict())


def test_torchvisions_convnext(tmp_path):
    """Files of torchvision's ConvNeXt give the same logits."""
    from torchvision.models.convnext import CNBlockConfig

    depths, width = (1, 2, 1, 1), 8
    widths = [width, 2 * width, 4 * width, 8 * width, None]
    settings = [CNBlockConfig(*widths[i : i + 2], depth) for i, depth in enumerate(depths)]
    network = randomized(torchvision.models.ConvNeXt(settings, num_classes=7))
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if key.endswith('layer_scale'):
                tensor += torch.randn(tensor.shape)
    torch.save(network.state_dict(), tmp_path / 'w')
    tensors = {key: torch.tensor(t) for key, t in filled(tmp_path / 'w', 'convnext4').items()}
    twin = peer('convnext4', 7, SIZE).eval()
    twin.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), network(images), rtol=1e-4, atol=1e-4)


def of_timm():
    """(name here, timm's name) of all networks that timm has."""
    named = {name: NAMES.get(name, name) for name in MODELS if name not in SMALL}
    return [pair for pair in named.items() if pair[1] in timm.list_models()]


@pytest.mark.parametrize(('name', 'theirs'), of_timm())
def test_normalization_is_that_of_timms_weights(name, theirs):
    """timm's default weights of ViT-L/14 are LAION's, which are an exception."""
    tag = '.openai' if name == 'clip_l14' else ''
    config = timm.models.get_pretrained_cfg(theirs + tag)
    normalization = NORMALIZATIONS[MODELS[name].normalization]
    assert normalization == (config.mean, config.std)


@pytest.mark.parametrize('name', LARGE)
def test_keys_and_shapes_are_timms(name):
    """For networks that are too large to test their values."""
    size = 2 * MODELS[name].multiple
    with torch.device('meta'):
        network = peer(name, 7, size)
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    shapes = nnx.eval_shape(lambda: create_model(config, 7, size, 0)[1])
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    ours = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        order = axes.get(leaf.ndim, range(leaf.ndim))
        ours[tensor_key(name, path)] = tuple(leaf.shape[axis] for axis in order)
    assert ours == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def test_recipes_of_one_network():
    """The statements of docs/howto/networks.md about recipes hold."""
    crops = {'a1_in1k': 0.95, 'a2_in1k': 0.95, 'tv_in1k': 0.875}
    for recipe, crop in crops.items():
        config = timm.models.get_pretrained_cfg(f'resnet50.{recipe}')
        assert config.crop_pct == crop and config.input_size == (3, 224, 224)
        assert (config.mean, config.std) == NORMALIZATIONS['imagenet']
    assert timm.models.get_pretrained_cfg('resnet50.a3_in1k').input_size == (3, 160, 160)
    for name in ('resnet18d', 'resnet50d'):
        config = timm.models.get_pretrained_cfg(f'{name}.ra4_e3600_r224_in1k')
        assert (config.mean, config.std) == NORMALIZATIONS['inception']
    config = timm.models.get_pretrained_cfg('vit_large_patch14_clip_224.laion2b')
    assert (config.mean, config.std) == NORMALIZATIONS['inception']


def test_the_authors_dinov2_with_registers(tmp_path):
    """As timm converts it: the class token's position is in the file, and added to the token."""
    network = peer('dinov2_4', 7, 5 * 14)
    tensors = {key: torch.randn_like(t) for key, t in network.state_dict().items()}
    theirs = {key: t for key, t in tensors.items() if not key.startswith('head.')}
    theirs['register_tokens'] = theirs.pop('reg_token')
    position = torch.randn(1, 1, 16)
    theirs['pos_embed'] = torch.cat([position, theirs['pos_embed']], dim=1)
    theirs['mask_token'] = torch.randn(1, 16)
    torch.save(theirs, tmp_path / 'w')
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(theirs), network)
    _, params, _ = make('dinov2_4', 5 * 14)
    weights = Weights(tmp_path / 'w', 'dinov2_4')
    assert weights.head is None
    ours = torch_tensors('dinov2_4', weights.fill(params, {})[0], {})
    same({key: t for key, t in ours.items() if key not in HEADS}, expected)
    np.testing.assert_array_equal(ours['cls_token'], tensors['cls_token'] + position)


@pytest.mark.parametrize('name', ['dinov2_4', 'clip4'])
def test_positions_of_another_size_are_resized_as_by_timm(name, tmp_path):
    side = MODELS[name].multiple
    network = peer(name, 7, 5 * side)
    torch.nn.init.normal_(network.pos_embed)
    torch.save(network.state_dict(), tmp_path / 'w')
    network.set_input_size(2 * side)
    _, params, _ = make(name, 2 * side)
    ours = Weights(tmp_path / 'w', name).fill(params, {}, with_head=True)[0]['pos_embed']
    np.testing.assert_allclose(ours, network.pos_embed.detach(), rtol=1e-3, atol=1e-4)


def test_positions_with_and_without_the_class_token_are_not_taken_for_one_another():
    for here, there in ((16, 17), (17, 16), (16, 10), (5, 9)):
        positions = np.zeros((1, here, 2), np.float32)
        assert resize_positions(positions, (1, there, 2)) is positions
    assert resize_positions(np.zeros((1, 16, 2), np.float32), (1, 9, 2)).shape == (1, 9, 2)
    assert resize_positions(np.zeros((1, 17, 2), np.float32), (1, 10, 2)).shape == (1, 10, 2)


def to_openai(key):
    """timm's key as in https://github.com/openai/CLIP, `clip/model.py`."""
    swaps = {
        'cls_token': 'class_embedding',
        'pos_embed': 'positional_embedding',
        'patch_embed.proj.': 'conv1.',
        'norm_pre.': 'ln_pre.',
        'blocks.': 'transformer.resblocks.',
        '.norm': '.ln_',
        'attn.qkv.': 'attn.in_proj_',
        'attn.proj.': 'attn.out_proj.',
        'mlp.fc1': 'mlp.c_fc',
        'mlp.fc2': 'mlp.c_proj',
    }
    if key.startswith('norm.'):
        return key.replace('norm.', 'ln_post.')
    for old, new in swaps.items():
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize('prefix', ['visual.', 'module.visual.', ''])
def test_openais_clip(prefix, tmp_path):
    """The image tower of a whole CLIP, which has a text tower with like keys, and by itself."""
    network = peer('clip4', 7, SIZE)
    tensors = {key: t for key, t in network.state_dict().items() if not key.startswith('head.')}
    theirs = {}
    for key, tensor in tensors.items():
        one = {'cls_token': tensor.reshape(-1), 'pos_embed': tensor[0]}.get(key, tensor)
        theirs[prefix + to_openai(key)] = one
    theirs[f'{prefix}proj'] = torch.randn(16, 5)
    if prefix:
        outer = prefix.removesuffix('visual.')
        text = {key.replace('visual.', ''): 1 + t for key, t in theirs.items()}
        for key in ('token_embedding.weight', 'ln_final.bias', 'logit_scale'):
            text[f'{outer}{key}'] = torch.ones(3)
        theirs = text | theirs
    torch.save(theirs, tmp_path / 'w')
    if prefix == 'visual.':
        assert (
            timm.models.vision_transformer.checkpoint_filter_fn(theirs, network).keys()
            - {'head.weight', 'head.bias'}
            == tensors.keys()
        )
    ours = filled(tmp_path / 'w', 'clip4', with_head=False)
    same({key: t for key, t in ours.items() if key not in HEADS}, tensors)


@pytest.mark.parametrize('name', SMALL)
def test_the_head_is_found_by_timms_name(name, tmp_path):
    network = peer(name, 7, SIZE)
    torch.save(network.state_dict(), tmp_path / 'w')
    head = Weights(tmp_path / 'w', name).head
    np.testing.assert_array_equal(head['kernel'].T, network.get_classifier().weight.detach())
    assert f'{MODELS[name].head}.weight' in network.state_dict()


@pytest.mark.parametrize('name', SMALL)
def test_networks_can_be_exported_for_any_batch_size(name):
    size = smallest(name)
    network = make(name, size)

    def logits(images):
        return forward(*network, images, train=False)[0].logits

    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
    with any_platform():
        exported = jax.export.export(jax.jit(logits), platforms=('cpu', 'cuda', 'tpu'))(images)
    (shape,) = exported.out_avals
    assert (str(shape.shape[0]), shape.shape[1]) == ('batch', 7)


def to_transformers(name, key):
    """timm's key as in transformers' `models/convnext`, `dinov2_with_registers` and `clip`."""
    swaps = {
        'convnext4': {
            'head.norm.': 'layernorm.',
            'stem.0.': 'embeddings.patch_embeddings.',
            'stem.1.': 'embeddings.layernorm.',
            'stages.': 'encoder.stages.',
            'downsample.': 'downsampling_layer.',
            'blocks.': 'layers.',
            'gamma': 'layer_scale_parameter',
            'conv_dw.': 'dwconv.',
            '.norm.': '.layernorm.',
            'mlp.fc': 'pwconv',
        },
        'dinov2_4': {
            'cls_token': 'embeddings.cls_token',
            'register_tokens': 'embeddings.register_tokens',
            'mask_token': 'embeddings.mask_token',
            'pos_embed': 'embeddings.position_embeddings',
            'patch_embed.proj.': 'embeddings.patch_embeddings.projection.',
            'blocks.': 'encoder.layer.',
            'attn.proj.': 'attention.output.dense.',
            'attn.': 'attention.attention.',
            'ls1.gamma': 'layer_scale1.lambda1',
            'ls2.gamma': 'layer_scale2.lambda1',
        },
        'clip4': {
            'cls_token': 'embeddings.class_embedding',
            'pos_embed': 'embeddings.position_embedding.weight',
            'patch_embed.proj.': 'embeddings.patch_embedding.',
            'norm_pre.': 'pre_layrnorm.',
            'blocks.': 'encoder.layers.',
            '.norm': '.layer_norm',
            'attn.proj.': 'self_attn.out_proj.',
            'attn.query.': 'self_attn.q_proj.',
            'attn.key.': 'self_attn.k_proj.',
            'attn.value.': 'self_attn.v_proj.',
        },
    }[name]
    if key.startswith('norm.'):
        return key.replace('norm.', 'post_layernorm.' if name == 'clip4' else 'layernorm.')
    for old, new in swaps.items():
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize(
    ('name', 'prefix'),
    [
        ('convnext4', 'convnext.'),
        ('convnext4', ''),
        ('dinov2_4', 'dinov2_with_registers.'),
        ('dinov2_4', ''),
        ('clip4', 'vision_model.'),
    ],
)
def test_transformers_layouts(name, prefix, tmp_path):
    size = smallest(name)
    network = peer(name, 7, size)
    expected = {k: t for k, t in network.state_dict().items() if k not in HEADS}
    theirs = {}
    for key, tensor in expected.items():
        if '.qkv.' in key:
            for part, each in zip(('query', 'key', 'value'), tensor.chunk(3), strict=True):
                theirs[key.replace('qkv', part)] = each
        else:
            theirs[key] = tensor
    if name == 'clip4':
        theirs |= {'cls_token': theirs['cls_token'][0, 0], 'pos_embed': theirs['pos_embed'][0]}
    if name == 'dinov2_4':
        position = torch.randn(1, 1, 16)
        theirs['register_tokens'] = theirs.pop('reg_token')
        theirs['mask_token'] = torch.zeros(1, 16)
        theirs['pos_embed'] = torch.cat([position, theirs['pos_embed']], dim=1)
        expected['cls_token'] = expected['cls_token'] + position
    theirs = {prefix + to_transformers(name, key): t.clone() for key, t in theirs.items()}
    if name == 'clip4':
        theirs |= {
            'text_model.encoder.layers.0.mlp.fc1.bias': torch.ones(3),
            'vision_model.embeddings.position_ids': torch.arange(5),
            'visual_projection.weight': torch.ones(5, 16),
        }
    torch.save(theirs, tmp_path / 'w')
    _, params, _ = make(name, size)
    ours = torch_tensors(name, Weights(tmp_path / 'w', name).fill(params, {})[0], {})
    same({key: t for key, t in ours.items() if key not in HEADS}, expected)
