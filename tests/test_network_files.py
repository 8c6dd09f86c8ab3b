"""Files of the networks that are not ResNets: other projects' layouts, and what is saved here."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_backbones import make, randomized
from torch_networks import NAMES, SMALL, peer, timm, torchvision

from xmixup_jax.models import MODELS, NORMALIZATIONS
from xmixup_jax.weights.files import save_weights, torch_tensors
from xmixup_jax.weights.pretrained import Weights

SIZE = 32


def filled(path, name, *, with_head=True):
    """timm's keys and arrays of the network here that has read a file."""
    _, params, batch_stats = make(name, SIZE)
    return torch_tensors(name, *Weights(path, name).fill(params, batch_stats, with_head=with_head))


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.numpy(), err_msg=key)


@pytest.mark.parametrize('name', SMALL)
def test_timm_loads_what_is_saved_here(name, tmp_path):
    """... with strict=True, and its file is read here."""
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
    """The logits are torchvision's too."""
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
    """(name here, timm's name) of the networks that timm has under the same or another name."""
    named = {name: NAMES.get(name, name) for name in MODELS if name not in SMALL}
    return [pair for pair in named.items() if pair[1] in timm.list_models()]


@pytest.mark.parametrize(('name', 'theirs'), of_timm())
def test_normalization_is_that_of_timms_weights(name, theirs):
    """Inception's are torchvision's, which timm converts as well."""
    config = timm.models.get_pretrained_cfg(theirs)
    normalization = NORMALIZATIONS[MODELS[name].normalization]
    assert normalization == (config.mean, config.std)


def test_recipes_of_one_network():
    """What docs/networks.md says of them."""
    crops = {'a1_in1k': 0.95, 'a2_in1k': 0.95, 'tv_in1k': 0.875}
    for recipe, crop in crops.items():
        config = timm.models.get_pretrained_cfg(f'resnet50.{recipe}')
        assert config.crop_pct == crop and config.input_size == (3, 224, 224)
        assert (config.mean, config.std) == NORMALIZATIONS['imagenet']
    assert timm.models.get_pretrained_cfg('resnet50.a3_in1k').input_size == (3, 160, 160)
    for name in ('resnet18d', 'resnet50d'):
        config = timm.models.get_pretrained_cfg(f'{name}.ra4_e3600_r224_in1k')
        assert (config.mean, config.std) == NORMALIZATIONS['inception']


@pytest.mark.parametrize('name', SMALL)
def test_the_head_is_found_by_timms_name(name, tmp_path):
    network = peer(name, 7, SIZE)
    torch.save(network.state_dict(), tmp_path / 'w')
    head = Weights(tmp_path / 'w', name).head
    np.testing.assert_array_equal(head['kernel'].T, network.get_classifier().weight.detach())
    assert f'{MODELS[name].head}.weight' in network.state_dict()
