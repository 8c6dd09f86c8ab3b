"""Every backbone against torchvision's or timm's with the same random weights."""

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch_networks import peer

from xmixup_jax.models import MODELS, create_model, forward
from xmixup_jax.models.pretrained import Weights, torch_tensors

CLASSES = 7
SIZES = {'inception_v3': 107, 'vit_s16': 48, 'vit_b16': 48}


def make(name, image_size=64, num_logits=CLASSES):
    """(graphdef, params, batch_stats), all zero: initialising the large ones takes long."""
    config = ConfigDict({'name': name, 'width': 64, 'stem': 'imagenet'})
    graphdef, *shapes = nnx.eval_shape(lambda: create_model(config, num_logits, image_size, 0))
    return graphdef, *jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def randomized(network, seed=0):
    """Statistics and affine parameters away from 0 and 1, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            centre = 0.0 if key.endswith(('bias', 'mean')) else 1.0
            tensor += (
                centre - tensor + 0.2 * torch.randn(tensor.shape, generator=generator).clip(-2, 2)
            )
    return network.eval()


def close(ours, expected, rtol):
    """Relative to the largest value."""
    expected = np.asarray(expected)
    assert ours.shape == expected.shape
    difference = np.abs(np.asarray(ours) - expected).max()
    assert difference <= rtol * np.abs(expected).max(), difference / np.abs(expected).max()


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'resnet10'])
def test_logits_features_and_gradient_are_the_peers(name, tmp_path):
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

    _, outputs = jax.jit(loss)(params, batch_stats, images)
    with torch.no_grad():
        close(outputs.logits, network(pixels), 1e-4)
    head = params['fc']
    close(outputs.features @ head['kernel'] + head['bias'], outputs.logits, 1e-4)

    # In float64, because rounding alone moves some float32 gradients of deep networks by 1 %.
    network.double()
    with jax.enable_x64(True):
        params, batch_stats, images = jax.tree.map(
            lambda x: np.asarray(x, np.float64), (params, batch_stats, images)
        )
        grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params, batch_stats, images)
    logits = network(pixels.double())
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    close(outputs.logits, logits.detach(), 1e-6)
    for key, ours in torch_tensors(name, grads, {}).items():
        close(ours, network.get_parameter(key).grad, 1e-6)
