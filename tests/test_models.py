import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file

from xmixup_jax.models import create_head, create_model, forward
from xmixup_jax.models.base import Keys
from xmixup_jax.weights.files import save_weights


def make(name='resnet10', width=4, stem='imagenet', num_logits=3, seed=0):
    config = ConfigDict({'name': name, 'width': width, 'stem': stem})
    return create_model(config, num_logits, 64, seed)


def randomize(tree, seed):
    """Statistics and affine parameters away from 0 and 1, so that each one matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (np.abs(rng.normal(size=x.shape)) + 0.5).astype(np.float32) * 0.3, tree
    )


@pytest.mark.parametrize('law', ['uniform', 'normal', 'zero'])
def test_a_head_alone_is_that_of_the_whole_network(law):
    config = ConfigDict({'name': 'resnet10', 'width': 4, 'stem': 'imagenet'})
    _, params, _ = create_model(config, 3, 64, 5, head_init=law)
    head = create_head(config, 3, 64, 5, head_init=law)
    assert head.keys() == params['fc'].keys()
    for key, leaf in head.items():
        np.testing.assert_array_equal(leaf, params['fc'][key])


def test_keys_are_flaxs():
    ours, theirs = Keys(5), nnx.Rngs(5)
    for _ in range(3):
        np.testing.assert_array_equal(*map(jax.random.key_data, (ours.params(), theirs.params())))


# Published sizes of torchvision's networks with 1,000 classes.
@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('resnet18', 11_689_512),
        ('resnet34', 21_797_672),
        ('resnet50', 25_557_032),
        ('resnet101', 44_549_160),
        ('convnext_tiny', 28_589_128),
        ('convnext_small', 50_223_688),
        ('convnext_base', 88_591_464),
    ],
)
def test_number_of_parameters(name, size):
    shapes = jax.eval_shape(lambda: make(name, 64, num_logits=1000)[1])
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == size


class NumpyResNet:
    """The forward pass in NumPy (float64, NCHW), from a state dict in torchvision's layout."""

    def __init__(self, tensors, stem):
        self.w = {key: value.astype(np.float64) for key, value in tensors.items()}
        self.stem = {'imagenet': (2, True), 'tiny': (2, False), 'cifar': (1, False)}[stem]

    def conv(self, x, key, stride):
        w = self.w[f'{key}.weight']
        pad = w.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
        return np.einsum('bihwkl,oikl->bohw', windows, w, optimize=True)

    def norm(self, x, key):
        mean, var, scale, bias = (
            self.w[f'{key}.{part}'][:, None, None]
            for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def block(self, x, key, stride):
        bottleneck = f'{key}.conv3.weight' in self.w
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        y = x
        for i, s in enumerate(strides, 1):
            y = self.norm(self.conv(y, f'{key}.conv{i}', s), f'{key}.bn{i}')
            if i < len(strides):
                y = np.maximum(y, 0)
        if f'{key}.downsample.0.weight' in self.w:
            x = self.norm(self.conv(x, f'{key}.downsample.0', stride), f'{key}.downsample.1')
        return np.maximum(x + y, 0)

    def __call__(self, images):
        stride, pooled = self.stem
        x = images.transpose(0, 3, 1, 2).astype(np.float64)
        x = np.maximum(self.norm(self.conv(x, 'conv1', stride), 'bn1'), 0)
        if pooled:
            x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
            x = sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((-2, -1))
        for stage in range(1, 5):
            i = 0
            while f'layer{stage}.{i}.conv1.weight' in self.w:
                x = self.block(x, f'layer{stage}.{i}', 2 if i == 0 and stage > 1 else 1)
                i += 1
        features = x.mean((2, 3))
        return features @ self.w['fc.weight'].T + self.w['fc.bias'], features


@pytest.mark.parametrize(
    ('name', 'stem', 'size'),
    [
        ('resnet10', 'imagenet', 33),
        ('resnet18', 'cifar', 12),
        pytest.param('resnet50', 'tiny', 24, marks=pytest.mark.slow),
        pytest.param('resnet50', 'imagenet', 32, marks=pytest.mark.slow),  # see test_backbones.py
    ],
)
def test_forward_against_numpy(tmp_path, name, stem, size):
    graphdef, params, batch_stats = make(name, 4, stem)
    batch_stats = randomize(batch_stats, 1)
    images = np.random.default_rng(2).normal(size=(2, size, size, 3)).astype(np.float32)
    outputs, unchanged = forward(graphdef, params, batch_stats, images, train=False)
    save_weights(tmp_path / 'w', name, params, batch_stats, {})
    logits, features = NumpyResNet(load_file(tmp_path / 'w'), stem)(images)
    for ours, expected in ((outputs.features, features), (outputs.logits, logits)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert len(outputs.stages) == 4
    jax.tree.map(np.testing.assert_array_equal, unchanged, batch_stats)
