"""Optimisers compared with those of PyTorch and timm, layer by layer."""

import importlib
from functools import partial

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from torch_networks import timm

from xmixup_jax.checks import validate
from xmixup_jax.errors import ConfigError
from xmixup_jax.models import create_model
from xmixup_jax.optimizer import depths, is_kernel, make_optimizer
from xmixup_jax.weights.files import tensor_key

optim = importlib.import_module('timm.optim')
SHAPES = {'conv1': (3, 2), 'bn1': (2,), 'fc': (2, 4)}
RATE, DECAY = 0.02, 0.1


def trained(config, gradients):
    """The parameters after the updates; all start at 0.01, 0.02, ..."""
    params = start()
    tx = make_optimizer(config.optimizer, steps=100)
    state = tx.init(params)
    for each in gradients:
        updates, state = tx.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params


def start():
    return {
        name: {'kernel': 0.01 * (1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape))}
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return [
        {
            name: {'kernel': rng.normal(size=shape).astype(np.float32)}
            for name, shape in SHAPES.items()
        }
        for _ in range(8)
    ]


def theirs(gradients, make, clip=None):
    """The same in PyTorch; `make` makes the optimiser from named parameters."""
    tensors = {
        name: torch.nn.Parameter(torch.tensor(leaf['kernel'])) for name, leaf in start().items()
    }
    optimizer = make(tensors)
    for each in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(each[name]['kernel'])
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
    return {name: {'kernel': tensor.detach().numpy()} for name, tensor in tensors.items()}


close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('clip', [0.0, 0.5])
@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb'])
def test_an_optimizer_is_the_peers(config, gradients, name, clip):
    config.optimizer.update(
        {'name': name, 'weight_decay': DECAY, 'learning_rate': RATE, 'clip_norm': clip, 'b2': 0.98}
    )

    def make(tensors):
        parameters, options = tensors.values(), {'lr': RATE, 'weight_decay': DECAY}
        if name == 'sgd':
            return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options)
        if name == 'adamw':
            return torch.optim.AdamW(parameters, betas=(0.9, 0.98), **options)
        return optim.Lamb(parameters, betas=(0.9, 0.98), eps=1e-8, max_grad_norm=None, **options)

    jax.tree.map(close, trained(config, gradients), theirs(gradients, make, clip))


def test_decay_of_kernels_alone(config, gradients):
    config.optimizer.update(
        {'name': 'adamw', 'weight_decay': DECAY, 'learning_rate': RATE, 'decayed': 'kernels'}
    )

    def make(tensors):
        groups = [
            {'params': [t for t in tensors.values() if t.ndim > 1], 'weight_decay': DECAY},
            {'params': [t for t in tensors.values() if t.ndim == 1], 'weight_decay': 0.0},
        ]
        return torch.optim.AdamW(groups, lr=RATE)

    jax.tree.map(close, trained(config, gradients), theirs(gradients, make))
    assert not is_kernel({'reg_token': np.zeros((1, 4, 2))})['reg_token']
    assert is_kernel({'pos_embed': np.zeros((1, 4, 2)), 'norm': {'scale': np.zeros(2)}}) == {
        'pos_embed': False,
        'norm': {'scale': False},
    }


def params_of(name, image_size=224):
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    return nnx.eval_shape(lambda: create_model(config, 10, image_size, 0)[1])


@pytest.mark.parametrize(
    ('name', 'peer'),
    [
        ('resnet18', 'resnet18'),
        ('resnet50', 'resnet50'),
        ('resnet50d', 'resnet50d'),
        ('efficientnet_lite0', 'efficientnet_lite0'),
        ('vit_s16', 'vit_small_patch16_224'),
        ('vit_l16', 'vit_large_patch16_224'),
        ('dinov2_s14_reg4', 'vit_small_patch14_reg4_dinov2'),
        ('clip_b16', 'vit_base_patch16_clip_224'),
        ('convnext_tiny', 'convnext_tiny'),
    ],
)
def test_layers_are_timms(name, peer):
    """The learning rate of each parameter is that of timm's layer decay."""
    with torch.device('meta'):
        model = timm.create_model(peer, num_classes=10)
    groups = optim.param_groups_layer_decay(model, layer_decay=0.5)
    by_tensor = {id(t): group['lr_scale'] for group in groups for t in group['params']}
    expected = {key: by_tensor[id(t)] for key, t in model.named_parameters()}
    found = {
        tensor_key(name, path): 0.5**depth
        for path, depth in jax.tree.leaves_with_path(depths(params_of(name)))
    }
    assert found == expected


def test_layers_of_an_inception_network():
    found = depths(params_of('inception_v3', 299))
    tops = {name: set(jax.tree.leaves(each)) for name, each in found.items()}
    assert all(len(each) == 1 for each in tops.values())
    order = sorted(tops, key=lambda name: -min(tops[name]))
    assert order == [*sorted(name for name in tops if name != 'fc'), 'fc']


def test_layer_decay_changes_the_rates(config, gradients):
    config.optimizer.update({'learning_rate': RATE, 'weight_decay': 0.0, 'momentum': 0.0})
    usual = trained(config, gradients)
    config.optimizer.layer_decay = 0.5
    decayed = trained(config, gradients)
    for name, factor in (('conv1', 0.5), ('bn1', 0.5), ('fc', 1.0)):
        before = start()[name]['kernel']
        close(decayed[name]['kernel'] - before, factor * (usual[name]['kernel'] - before))


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'optimizer.name': 'adam'}, 'sgd, adamw, lamb'),
        ({'optimizer.b2': 1.0}, 'from 0 to below 1'),
        ({'optimizer.layer_decay': 1.5}, 'from 0 to 1'),
        ({'optimizer.clip_norm': -1.0}, 'from 0'),
        ({'optimizer.name': 'lamb', 'optimizer.momentum': 1.0}, 'lamb needs a value below 1'),
    ],
)
def test_bad_values_end_in_one_line(config, values, words):
    config.update_from_flattened_dict(values)
    with pytest.raises(ConfigError, match=words):
        validate(config, 1)
