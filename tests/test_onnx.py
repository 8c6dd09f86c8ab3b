"""Networks as ONNX files, run by ONNX Runtime."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx
from onnxruntime import InferenceSession
from PIL import Image
from test_backbones import close, make, networks

from configs import digits
from xmixup_jax.cli import export as export_lib
from xmixup_jax.compute.step import create_task
from xmixup_jax.errors import DataError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import MODELS
from xmixup_jax.models.onnx_export import to_onnx
from xmixup_jax.predictor import TrainedModel, load
from xmixup_jax.weights.files import save_weights

CLASSES = ('a cat', 'a dog', 'café', 'x')
SMALL = ('convnext4', 'dinov2_4', 'clip4')  # see conftest.py
# One of each kind: the others have the same layers.
NETWORKS = (
    *('resnet18', *SMALL),
    *('resnet18d', 'resnet50', 'efficientnet_lite0', 'inception_v3', 'vit_s16'),
)
DOCUMENT = Path(__file__).parents[1] / 'docs' / 'howto' / 'use.md'


def logits_of(model, images):
    """ONNX Runtime's."""
    (logits,) = InferenceSession(model.SerializeToString()).run(['logits'], {'images': images})
    return logits


def sizes(values):
    """Names or numbers, as the file has them."""
    return [size.dim_param or size.dim_value for size in values.type.tensor_type.shape.dim]


def randomized(tree):
    """Arrays through which the signal of an image reaches the logits."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        spread = (2 / math.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.2
        centre = 1.0 if path[-1].key in ('scale', 'var') else 0.0
        return (centre + spread * rng.normal(size=leaf.shape).clip(-2, 2)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, tree)


@pytest.mark.parametrize(
    'name',
    networks(NETWORKS, quick=('resnet18', *SMALL)),
)
def test_every_network_has_the_same_logits_as_an_onnx_file(name, tmp_path):
    size = 107 if name == 'inception_v3' else 2 * max(32, MODELS[name].multiple)
    size = 56 if MODELS[name].multiple == 14 else size
    config = digits.get_config()
    config.update({'image_size': size, 'resize': size + 4})
    config.model.update({'name': name, 'width': 64, 'stem': 'imagenet', 'normalization': ''})
    graphdef, *trees = make(name, size, len(CLASSES))
    trained = TrainedModel(config, CLASSES, graphdef, *map(randomized, trees), tmp_path, {})
    export_lib.export(trained, 'onnx', tmp_path / 'model.onnx')

    model = onnx.load(tmp_path / 'model.onnx')
    onnx.checker.check_model(model, full_check=True)
    assert [(x.name, sizes(x)) for x in model.graph.input] == [('images', ['batch', size, size, 3])]
    assert [(x.name, sizes(x)) for x in model.graph.output] == [('logits', ['batch', 4])]
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == json.loads((tmp_path / 'model.onnx.json').read_text())
    assert tuple(metadata['class_names']) == CLASSES
    assert (metadata['image_size'], metadata['resize']) == (size, size + 4)
    # The layout changes once in networks of convolutions and batch norm.
    kinds = [node.op_type for node in model.graph.node]
    if MODELS[name].has_batch_norm:
        assert kinds.count('Transpose') == 1

    rng = np.random.default_rng(0)
    for batch in (1, 3):
        images = rng.integers(256, size=(batch, size, size, 3), dtype=np.uint8)
        expected = jax.jit(trained.logits)(images)
        close(logits_of(model, images), expected, 1e-4)
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # they see the images


@pytest.mark.parametrize(
    'function',
    [
        lambda x: x.mean((1, 2)) - x.max((1, 2)),
        lambda x: jnp.concatenate([x, 2 - x], axis=1).reshape(x.shape[0], -1),
        lambda x: jnp.einsum('bijc,bkjc->bjik', x, x)[:, 1, 2],
        lambda x: jnp.einsum('bijc,cdj->bid', x, jnp.arange(24.0).reshape(3, 2, 4)).sum(2),
        lambda x: jnp.maximum(x[:, 1, 2], jnp.array([0.1, 0.0, -0.2])),
        lambda x: jnp.broadcast_to(x.mean((1, 2, 3))[:, None], (x.shape[0], 5)),
        lambda x: jax.nn.gelu(x[:, 0, 0] - 0.3, approximate=False) / jnp.exp(-x[:, 1, 1]),
        lambda x: nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))).sum((1, 2)),
        lambda x: nnx.max_pool(x, (3, 2), (2, 1), ((1, 0), (0, 1))).sum((1, 2)),
        lambda x: jnp.minimum(x, x.transpose(0, 2, 1, 3)).sum((1, 2)),
    ],
)
def test_operations(function):
    def whole(images):
        x = images.astype(jnp.float32) / 255
        # From here on the graph has the channels first.
        kernel = jnp.eye(3)[None, None] + 0.1
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return function(x)

    images = np.random.default_rng(0).integers(256, size=(3, 4, 4, 3), dtype=np.uint8)
    model = to_onnx(whole, 4, {})
    onnx.checker.check_model(model, full_check=True)
    close(logits_of(model, images), whole(images), 1e-6)


def test_an_unknown_operation_is_named():
    with pytest.raises(DataError, match=r'not written to ONNX \(sort\): take --format=stablehlo'):
        to_onnx(lambda images: jnp.sort(images.reshape(-1, 48).astype(jnp.float32)), 4, {})


def test_without_the_package(finished_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(DataError, match=r'--format=onnx needs the package onnx: run  pip install'):
        export_lib.export(load(finished_run[1]), 'onnx', tmp_path / 'model.onnx')
    assert not list(tmp_path.glob('*.onnx*'))


def test_the_example_in_the_documents_predicts_the_same(config, tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', DOCUMENT.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if 'onnxruntime' in block)
    config.update({'method': 'finetune', 'image_size': 28, 'resize': 32})
    rng = np.random.default_rng(0)
    shapes = ((40, 90), (150, 100), (64, 64), (20, 24))
    colours = rng.integers(256, size=(len(shapes), 3, 4, 3), dtype=np.uint8)
    images = [
        Image.fromarray(colour).resize(shape, Image.Resampling.BICUBIC)
        for colour, shape in zip(colours, shapes, strict=True)
    ]
    # A random network whose answers differ from image to image.
    task, state = create_task(config, Sizes(10))
    trained = TrainedModel(config, (), task.graphdef, state.params, state.batch_stats, tmp_path, {})
    logits = trained.logits(np.stack([image.resize((28, 28)) for image in images]))
    old = state.params['fc']
    head = {'kernel': 20 * old['kernel'], 'bias': -20 * (logits - old['bias']).mean(0)}
    content = {'class_names': tuple('abcdefghij'), 'config': config.to_dict()}
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run' / 'model.safetensors'
    params = state.params | {'fc': jax.tree.map(np.asarray, head)}
    save_weights(path, config.model.name, params, state.batch_stats, content)

    export_lib.run(['export', f'--workdir={path.parent}', '--format=onnx', f'--output={tmp_path}'])
    seen = set()
    for image in images:
        image.save(tmp_path / 'image.png')
        shutil.copy(tmp_path / 'image.png', tmp_path / 'image.jpg')  # the content tells the format
        done = subprocess.run(
            [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        name, probability = done.stdout.split()
        (prediction,) = load(path.parent).predict(tmp_path / 'image.png')
        assert name == prediction.class_names[0]
        assert float(probability) == pytest.approx(float(prediction.probabilities[0]), abs=0.02)
        seen.add(name)
    assert len(seen) > 1
