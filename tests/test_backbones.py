"""Every backbone against torchvision's or timm's with the same random weights."""

import itertools
import shutil

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch_networks import SMALL, peer

from xmixup_jax.methods.fsp import flow
from xmixup_jax.models import MODELS, cpu, create_model, forward, vit
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import torch_tensors
from xmixup_jax.weights.pretrained import Weights

CLASSES = 7
SIZES = {'resnet18d': 72, 'inception_v3': 107}
# A vision transformer's images are three patches wide here.
SIZES |= {name: 3 * each.patch for name, each in vit.VARIANTS.items()}
# These have more of the same blocks; test_network_files.py compares only their shapes.
LARGE = [name for name, each in vit.VARIANTS.items() if each.depth > 12]
# The modules whose outputs DELTA's public code compares, and similar ones in EfficientNet-Lite. For
# other networks, the ends of the stages.
LAST_CONVOLUTIONS = {
    'resnet18': [f'layer{i}.1.conv2' for i in (1, 2, 3, 4)],
    'resnet50': ['layer1.2.conv3', 'layer2.3.conv3', 'layer3.5.conv3', 'layer4.2.conv3'],
    'resnet101': ['layer1.2.conv3', 'layer2.3.conv3', 'layer3.22.conv3', 'layer4.2.conv3'],
    'resnet18d': [f'layer{i}.1.conv2' for i in (1, 2, 3, 4)],
    'efficientnet_lite0': [
        *('blocks.0.0.conv_pw', 'blocks.1.1.conv_pwl', 'blocks.2.1.conv_pwl'),
        *('blocks.4.2.conv_pwl', 'blocks.6.0.conv_pwl'),
    ],
    **{name: [f'stages.{i}' for i in range(4)] for name in ('convnext_tiny', 'convnext4')},
    **{
        name: [f'blocks.{(i + 1) * each.depth // 4 - 1}' for i in range(4)]
        for name, each in vit.VARIANTS.items()
    },
}


def make(name, image_size=64, num_logits=CLASSES):
    """(graphdef, params, batch_stats), all zero, since initialising large networks takes long."""
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    graphdef, *shapes = nnx.eval_shape(lambda: create_model(config, num_logits, image_size, 0))
    return graphdef, *jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def randomized(network, seed=0):
    """Moves statistics and affine parameters away from 0 and 1, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            centre = 0.0 if key.endswith(('bias', 'mean')) else 1.0
            tensor += (
                centre - tensor + 0.2 * torch.randn(tensor.shape, generator=generator).clip(-2, 2)
            )
    return network.eval()


def close(ours, expected, rtol):
    """Compares arrays with a tolerance relative to the largest value."""
    expected = np.asarray(expected)
    assert ours.shape == expected.shape
    difference = np.abs(np.asarray(ours) - expected).max()
    assert difference <= rtol * np.abs(expected).max(), difference / np.abs(expected).max()


def networks(names, quick):
    """Marks all networks as slow except the `quick` ones, which have the same layers."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def with_the_same_weights(name, tmp_path):
    """(peer network, loss function, its arguments, the peer's pixels, labels), for two images."""
    size = SIZES.get(name, 64)
    network = randomized(peer(name, CLASSES, size))
    path = tmp_path / 'w.safetensors'
    save_file(network.state_dict(), path)
    graphdef, params, batch_stats = make(name, size)
    params, batch_stats = Weights(path, name).fill(params, batch_stats, with_head=True)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    labels = rng.integers(CLASSES, size=2)

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))

    def loss(params, batch_stats, images):
        outputs, _ = forward(graphdef, params, batch_stats, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
        return losses.mean(), outputs

    return network, loss, (params, batch_stats, images), pixels, labels


@pytest.mark.parametrize(
    'name',
    networks(
        [name for name in MODELS if name not in ('resnet6', 'resnet10', *LARGE)],
        quick=(
            'resnet18',
            'resnet18d',
            'resnet50',
            'efficientnet_lite0',
            'inception_v3',
            'vit_s16',
            *SMALL,
        ),
    ),
)
def test_logits_and_features_are_the_peers(name, tmp_path):
    network, loss, arguments, pixels, _ = with_the_same_weights(name, tmp_path)
    maps = []
    for key in LAST_CONVOLUTIONS.get(name, ()):
        module = network.get_submodule(key)
        module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    _, outputs = jax.jit(loss)(*arguments)
    with torch.no_grad():
        close(outputs.logits, network(pixels), 1e-4)
    for ours, theirs in zip(outputs.convs, maps, strict=bool(maps)):
        if theirs.ndim == 3:  # tokens, those of the patches last
            theirs = theirs[:, -ours.shape[1] * ours.shape[2] :].unflatten(1, ours.shape[1:3])
        else:
            theirs = theirs.permute(0, 2, 3, 1)
        close(ours, theirs, 1e-4)
    head = arguments[0]['fc']
    close(outputs.features @ head['kernel'] + head['bias'], outputs.logits, 1e-4)


@pytest.mark.parametrize(
    'name',
    networks(
        (
            'resnet18',
            'resnet50',
            'efficientnet_lite0',
            'inception_v3',
            'vit_s16',
            'resnet18d',
            *SMALL,
        ),
        quick=('resnet18', *SMALL),
    ),
)
def test_gradient_is_the_peers(name, tmp_path):
    """In float64, since rounding changes some float32 gradients of deep networks by 1 %."""
    network, loss, arguments, pixels, labels = with_the_same_weights(name, tmp_path)
    network.double()
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
        grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
    logits = network(pixels.double())
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    close(outputs.logits, logits.detach(), 1e-6)
    for key, ours in torch_tensors(name, grads, {}).items():
        close(ours, network.get_parameter(key).grad, 1e-6)


# Side of each stage's map in px and its channels, for images of 96 px (Inception: 107, DINOv2: 84).
STAGES = {
    'resnet50': [(24, 256), (12, 512), (6, 1024), (3, 2048)],
    'efficientnet_lite0': [(48, 16), (24, 24), (12, 40), (6, 112), (3, 320)],
    'inception_v3': [(51, 64), (23, 192), (11, 288), (5, 768), (2, 2048)],
    'vit_s16': [(6, 384)] * 4,
    'dinov2_4': [(6, 16)] * 4,
    'clip4': [(6, 16)] * 4,
    'convnext4': [(24, 8), (12, 16), (6, 32), (3, 64)],
}


@pytest.mark.parametrize('name', STAGES)
def test_stages_and_their_hooks(name):
    size = {'inception_v3': 107, 'dinov2_4': 84}.get(name, 96)
    graphdef, params, batch_stats = make(name, size)
    images = np.zeros((2, size, size, 3), np.float32)

    def outputs(hook=None):
        return forward(graphdef, params, batch_stats, images, train=False, hook=hook)[0]

    shapes = jax.eval_shape(outputs)
    maps = shapes.stages
    # In these networks, the last convolution of a stage has the same shape as the stage.
    assert [m.shape for m in shapes.convs] == [m.shape for m in maps]
    assert [(m.shape[1], m.shape[3]) for m in maps] == STAGES[name]
    assert all(m.shape[1] == m.shape[2] for m in maps)
    # FSP can compute the flow between any two consecutive maps.
    pairs = itertools.pairwise(maps)
    assert all(jax.eval_shape(flow, *pair).shape[0] == 2 for pair in pairs)
    # Hooks are called at the last convolution and the end of each stage, and may halve the batch.
    called = []

    def hook(x, stage, place):
        called.append((stage, place, x.shape[-1]))
        return x[:1] if (stage, place) == (len(maps) - 2, 'end') else x

    assert jax.eval_shape(lambda: outputs(hook)).logits.shape == (1, CLASSES)
    places = itertools.product(enumerate(maps), ('conv', 'end'))
    assert called == [(i, place, m.shape[3]) for (i, m), place in places]


@pytest.mark.slow
@pytest.mark.parametrize('name', STAGES)
def test_channels_do_not_meet_between_a_stages_last_convolution_and_its_end(name):
    size = {'inception_v3': 107, 'dinov2_4': 84}.get(name, 96)
    graphdef, params, batch_stats = make(name, size)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) / max(1, leaf[..., 0].size) ** 0.5).astype('f4')

    params = jax.tree.map(draw, params)
    batch_stats = jax.tree.map(np.ones_like, batch_stats)
    images = rng.normal(size=(1, size, size, 3)).astype('f4')

    @jax.jit
    def ends(c, kept, params):
        """The ends of the stages, each without channel c of its convolution alone."""
        found = []

        def hook(x, stage, place):
            if place == 'conv':
                return x * (np.arange(x.shape[-1]) != c)
            found.append(x)
            return kept[stage] if kept else x

        forward(graphdef, params, batch_stats, images, train=False, hook=hook)
        return found

    kept = ends(-1, [], params)
    whole, without = ends(-1, kept, params), ends(1, kept, params)  # by the same program
    changed = [
        set(np.nonzero(before != after)[-1].tolist())
        for before, after in zip(whole, without, strict=True)
    ]
    assert set.union(*changed) == {1} and all(np.isfinite(end).all() for end in whole)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3]))
@example(9, 4, 7, 1)  # ConvNeXt's kernels, whose gradients are computed differently
@settings(max_examples=8)
def test_depthwise_convolution_on_a_cpu_is_xlas(height, width, side, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 4)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 4)).astype(np.float32)
    ours, pullback = jax.vjp(lambda *xs: cpu.sum_of_shifts(*xs, stride), x, kernel)
    expected, pullback_2 = jax.vjp(lambda *xs: cpu.grouped_conv(*xs, stride), x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    grad = rng.normal(size=ours.shape).astype(np.float32)
    for mine, theirs in zip(pullback(grad), pullback_2(grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_network_without_batch_norm_trains_and_continues(config, tmp_path, monkeypatch):
    # Two blocks in place of twelve, which take long to compile.
    monkeypatch.setattr(vit, '_STAGES', 2)
    monkeypatch.setitem(vit.VARIANTS, 'vit_s16', vit.VARIANTS['vit_s16']._replace(depth=2))
    config.model.update({'name': 'vit_s16', 'width': 64, 'stem': 'imagenet'})
    config.method = 'finetune'
    config.update({'resize': 36, 'image_size': 32, 'steps': 2, 'checkpoint_every': 1})
    whole = train_and_evaluate(config, tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    for path in ('checkpoints/2', 'result.json', 'model.safetensors'):
        path = tmp_path / 'again' / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = train_and_evaluate(config, tmp_path / 'again')
    assert again['loss'] == whole['loss']
    ours, theirs = (load_file(tmp_path / run / 'model.safetensors') for run in ('whole', 'again'))
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
