"""Weights of other programs, with their wrappers, names and key layouts."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import io
import json
import logging
import pathlib
import pickle
import sys
import types
import warnings
import zipfile

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import save_file
from test_backbones import close, make, randomized
from torch_networks import peer

from xmixup_jax.errors import DataError
from xmixup_jax.models import create_model, forward
from xmixup_jax.weights.files import torch_tensors
from xmixup_jax.weights.find import find_weights
from xmixup_jax.weights.pretrained import Weights, load_weights

FORM = {'width': 4, 'stem': 'cifar'}
SMALL = ConfigDict({'name': 'resnet10', **FORM})


def state_dict(seed=0):
    """The state dict of a small ResNet as PyTorch tensors; each seed gives other values."""
    _, params, batch_stats = create_model(SMALL, 3, 8, seed)
    rng = np.random.default_rng(seed)
    tensors = torch_tensors('resnet10', params, batch_stats)
    state = {
        key: torch.from_numpy(rng.uniform(0.5, 1, array.shape).astype(np.float32))
        for key, array in tensors.items()
    }
    return state | {'bn1.num_batches_tracked': torch.tensor(3)}


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_read(name, state):
    """Asserts that the whole network is read from the file, with these values."""
    network = load_weights(str(name), 'resnet10', **FORM)
    read = torch_tensors('resnet10', network.params, network.batch_stats)
    assert read.keys() == {key for key in state if not key.endswith('tracked')}
    for key, array in read.items():
        np.testing.assert_array_equal(array, state[key].numpy(), key)


def refused(path, *words):
    """Asserts that the file is refused with one line that has these words; returns the line."""
    with pytest.raises(DataError) as info:
        load_weights(str(path), 'resnet10', **FORM)
    line = str(info.value)
    assert '\n' not in line and len(line) < 900
    for each in words:
        assert each in line
    return line


# ------------------------------------------------------------------ objects beside the tensors


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    rate: float = 0.1
    names: tuple = ('a', 'b')


class AttributeDict(dict):
    """A dictionary with attributes, as in Lightning."""


Pair = collections.namedtuple('Pair', 'a b')


class Harm:
    """Would exit the process if it were unpickled."""

    def __reduce__(self):
        return eval, ('exit(77)',)


OBJECTS = {
    'namespace': argparse.Namespace(lr=0.1, data=pathlib.Path('/data'), none=None, on=True),
    'attributes': AttributeDict(hidden=3, inner=AttributeDict(x=[1, 2])),
    'path': pathlib.PurePosixPath('/a/b'),
    'numbers': [np.float64(0.5), np.int64(3), np.float32(1), 1.5, 2**70, -(2**70), 1j],
    'array': np.arange(6).reshape(2, 3),
    'dtype': np.dtype('float32'),
    'size': torch.Size([1, 2]),
    'torch': [torch.float32, torch.device('cpu')],
    'enum': Colour.RED,
    'time': [datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.UTC],
    'partial': functools.partial(int, base=2),
    'sets': [{1, 2}, frozenset('ab'), set()],
    'slice': slice(1, 2),
    'range': range(3),
    'bytes': [b'abc', bytearray(b'abc')],
    'dataclass': Options(),
    'collections': [collections.Counter('aab'), collections.deque([1]), Pair(1, 2)],
    'default': collections.defaultdict(list, a=[1]),
    'keys': {None: 1, (1, 2): 2, 1.5: 3, Colour.RED: 4, b'x': 5, True: 6, 2**80: 7},
    'function': json.dumps,
    'long': 'x' * 300,
    'complex': torch.zeros(2, dtype=torch.complex64),
    'harm': Harm(),
}


def optimizer_state():
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    return optimizer.state_dict(), schedule.state_dict()


OPTIMIZER, SCHEDULE = optimizer_state()
CHECKPOINTS = {
    # torchvision's references/classification/train.py
    'torchvision': lambda state: {
        'model': collections.OrderedDict(state), 'optimizer': OPTIMIZER, 'lr_scheduler': SCHEDULE,
        'epoch': 3, 'args': argparse.Namespace(lr=0.1, model='resnet18'), 'scaler': {'scale': 2.0},
    },
    # timm's CheckpointSaver
    'timm': lambda state: {
        'epoch': 3, 'arch': 'resnet10', 'state_dict': state, 'optimizer': OPTIMIZER, 'version': 2,
        'args': argparse.Namespace(**OBJECTS), 'amp_scaler': {}, 'metric': np.float64(71.2),
    },
    # PyTorch Lightning's Trainer.save_checkpoint
    'lightning': lambda state: {
        'epoch': 3, 'global_step': 9, 'pytorch-lightning_version': '2.4.0',
        'state_dict': collections.OrderedDict(prefixed(state, 'model.')),
        'loops': {'fit_loop': {'state_dict': {}, 'epoch_progress': {'total': {'ready': 1}}}},
        'callbacks': {"ModelCheckpoint{'monitor': 'loss'}": {
            'best_model_score': torch.tensor(0.5), 'best_model_path': '/a/b.ckpt',
            'best_k_models': {'/a/b.ckpt': torch.tensor(0.5)}, 'dirpath': pathlib.Path('/a'),
        }},
        'optimizer_states': [OPTIMIZER], 'lr_schedulers': [SCHEDULE], 'MixedPrecision': {},
        'hparams_name': 'kwargs', 'hyper_parameters': AttributeDict(OBJECTS),
        'datamodule_hyper_parameters': OBJECTS,
    },
    'tutorial': lambda state: {'model_state_dict': state, 'loss': 0.3, 'epoch': 1},
    'own name': lambda state: {'my_weights': state, 'acc': torch.tensor(0.5), 'x': Harm()},
    'nested': lambda state: {'state_dict': {'model': state}, 'objects': OBJECTS},
    'flat': lambda state: {**state, **OBJECTS, 'complex': None},
    'class of its own': lambda state: AttributeDict(state_dict=AttributeDict(state)),
    'attributes': lambda state: with_metadata(state),
}  # fmt: skip


def with_metadata(state):
    made = collections.OrderedDict(state)
    made._metadata = collections.OrderedDict({'': {'version': 1}})
    return made


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints_of_training_programs(tmp_path, name, zipped):
    state = state_dict()
    for protocol in (2, 4):
        torch.save(
            CHECKPOINTS[name](state),
            tmp_path / 'w.pth',
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        assert_read(tmp_path / 'w.pth', state)


def test_no_module_is_imported_for_objects(tmp_path):
    module = types.ModuleType('a_module_that_is_gone')
    module.Thing = type('Thing', (), {'__module__': module.__name__})
    sys.modules[module.__name__] = module
    try:
        thing = module.Thing()
        thing.attribute = thing
        torch.save({'model': state_dict(), 'thing': thing}, tmp_path / 'w.pth')
    finally:
        del sys.modules[module.__name__]
    assert_read(tmp_path / 'w.pth', state_dict())
    assert module.__name__ not in sys.modules


def test_an_object_in_place_of_a_tensor(tmp_path):
    state = state_dict()
    torch.save({'model': state | {'conv1.weight': Harm()}}, tmp_path / 'w.pth')
    refused(
        tmp_path / 'w.pth', "its entry 'conv1.weight' is a __builtin__.eval, which is not a plain"
    )
    with warnings.catch_warnings(action='ignore'):  # the type is deprecated
        state['fc.weight'] = torch.quantize_per_tensor(state['fc.weight'], 0.1, 0, torch.qint8)
    torch.save(state, tmp_path / 'w.pth')
    refused(tmp_path / 'w.pth', "'fc.weight' is a torch._utils._rebuild_qtensor, which is not")


def test_networks_that_were_pickled_whole(tmp_path):
    network = randomized(peer('resnet18', 5, 32))
    compiled = torch.nn.DataParallel(network)
    for name, saved in (('plain', network), ('wrapped', {'model': compiled, 'epoch': 1})):
        torch.save(saved, tmp_path / name)
        read = Weights(tmp_path / name, 'resnet18').tensors
        expected = network.state_dict()
        assert read.keys() == {key for key in expected if not key.endswith('tracked')}
        for key, array in read.items():
            np.testing.assert_array_equal(array, expected[key].numpy())


def test_tensors_of_other_classes(tmp_path):
    class Marked(torch.Tensor):
        pass

    Marked.__qualname__ = 'Marked'
    globals()['Marked'] = Marked
    state = state_dict()
    saved = {
        key: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for key, t in state.items()
    }
    saved['fc.bias'] = state['fc.bias'].as_subclass(Marked)
    saved['fc.weight'].note = 'attributes of a parameter'
    torch.save(saved, tmp_path / 'w.pth')
    assert_read(tmp_path / 'w.pth', state)
    del globals()['Marked']


# ------------------------------------------------------------------ the content tells the format


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'name', ['weights', 'model.ckpt', 'best.tar', 'w.safetensors', 'w.npz', 'a#b', 'epoch=3.x']
)
def test_names_do_not_matter(tmp_path, name, zipped):
    torch.save(state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / name, state_dict())


def test_other_formats_under_other_names(tmp_path):
    state = state_dict()
    for name in ('weights', 'w.pth', 'w.ckpt'):
        save_file(state, tmp_path / name)
        assert_read(tmp_path / name, state)
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    arrays['conv1.weight'] = np.asfortranarray(arrays['conv1.weight'])
    for save in (np.savez, np.savez_compressed):
        with (tmp_path / 'w').open('wb') as file:
            save(file, **arrays)
        assert_read(tmp_path / 'w', state)
    (tmp_path / 'folder').mkdir()
    torch.save(state, tmp_path / 'folder' / 'pytorch_model.bin')
    assert_read(tmp_path / 'folder', state)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state_dict().items()}
    expected = {key: tensor.float() for key, tensor in state.items()}
    torch.save(state, tmp_path / 'w.pth')
    assert_read(tmp_path / 'w.pth', expected)
    save_file(state, tmp_path / 'w.safetensors')
    assert_read(tmp_path / 'w.safetensors', expected)


def zip_of(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name in names:
            archive.writestr(name, b'x')
    return buffer.getvalue()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


NOT_WEIGHTS = {
    'empty': (b'', 'it is empty: download or copy it again'),
    'zeros': (bytes(5000), 'begins with zeros, like an interrupted download'),
    'page': (b'\n<!DOCTYPE html><html>', 'it is a web page, not a weights file: download'),
    'lfs': (
        b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n',
        'a Git LFS pointer, not the file itself: run  git lfs pull',
    ),
    'reply': (b'{"error":"Repository not found"}', 'a text file that begins with \'{"error"'),
    'index': (b'{"metadata": {}, "weight_map": {"a": "model-00001"}}', 'index of sharded weights'),
    'text': (b'Entry not found', "it is a text file that begins with 'Entry not found'"),
    'keras.h5': (b'\x89HDF\r\n\x1a\n' + bytes(20), 'an HDF5 file (Keras), which is not supported'),
    'net.onnx': (b'\x08\x08\x12\x07pytorch\x1a\x052.1', 'an ONNX file, which is not supported'),
    'gguf': (b'GGUF\x03\0\0\0', 'a GGUF file'),
    'tflite': (b'\x1c\0\0\0TFL3', 'a TensorFlow Lite file'),
    'gzip': (b'\x1f\x8b\x08\0', 'compressed with gzip: unpack it first'),
    'tar': (b'a'.ljust(257, b'\0') + b'ustar', 'a tar archive: unpack it'),
    'npy': (b'\x93NUMPY\x01\0', 'a single array (.npy)'),
    'zip': (zip_of('a/model.pth', 'b'), "zip archive of 2 other files ('a/model.pth', 'b'): unp"),
    'keras': (zip_of('config.json', 'model.weights.h5'), 'it is a Keras model'),
    'arrays': (
        saved({'model': {'a': np.zeros(3)}}),
        'it contains NumPy arrays, not tensors: save them',
    ),
    'list': (saved([torch.zeros(3)]), 'it contains a list, not a dictionary of tensors'),
    'tensor': (saved(torch.zeros(3)), 'it contains one tensor, not a dictionary of tensors'),
    'optimiser': (saved(OPTIMIZER), "its entries ('state' and 'param_groups') contain no tensors"),
    'script': (zip_of('m/data.pkl', 'm/code/a.py'), 'a TorchScript program: in PyTorch, run'),
    'flax.msgpack': (b'\x81\xa6params\x00', 'a msgpack file of Flax'),
    'unknown': (b'\xff\xfe\x00\x01', 'its format is unknown: give a file of safetensors'),
    'pickle': (pickle.dumps({'a': 1}), 'it is a pickle, but not from PyTorch'),
}


@pytest.mark.parametrize('name', NOT_WEIGHTS)
def test_files_that_are_no_weights(tmp_path, name):
    content, words = NOT_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, str(tmp_path / name), words)


def test_files_that_are_cut_short(tmp_path):
    torch.save(state_dict(), tmp_path / 'new.pth')
    torch.save(state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    save_file(state_dict(), tmp_path / 'w.safetensors')
    np.savez(tmp_path / 'w.npz', a=np.zeros(100))
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for end in (5, 700, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:end])
            refused(path, str(path))
        path.write_bytes(whole[: len(whole) // 2])
        refused(path, 'download or copy it again')


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('nets/model.ckpt', './weights', 'net.h5', str(tmp_path / 'a' / 'b')):
        refused(name, 'does not exist: give a .safetensors')
    (tmp_path / 'run').mkdir()
    refused('run', 'contains no weights')
    (tmp_path / 'run' / 'epoch=3.ckpt').touch()
    refused('run', 'give the path of a file in it, for example run/epoch=3.ckpt')
    (tmp_path / 'run' / '.metadata').touch()
    refused('run', 'dcp_to_torch run weights.pth')


# ------------------------------------------------------------------ prefixes


@pytest.mark.parametrize(
    'prefix',
    [
        *('module.', '_orig_mod.', 'model.', 'backbone.', 'encoder.', 'net.', 'network.'),
        *('student.', 'teacher.', 'module._orig_mod.', 'model._orig_mod.', '_orig_mod.module.'),
        *('module.model.backbone.', 'model.module._orig_mod.'),
    ],
)
def test_known_prefixes(tmp_path, prefix, caplog):
    state = state_dict()
    torch.save({'state_dict': prefixed(state, prefix)}, tmp_path / 'w.pth')
    caplog.set_level(logging.INFO, 'xmixup_jax')
    for _ in range(2):
        assert_read(tmp_path / 'w.pth', state)
    lines = [record.getMessage() for record in caplog.records if 'prefix' in record.getMessage()]
    assert len(lines) == 1  # logged only once
    assert f'w.pth: stripping the prefix {prefix} from ' in lines[0]


def test_tensors_beside_the_prefix(tmp_path):
    state = state_dict()
    beside = {'criterion.weight': torch.ones(3), 'queue': torch.ones(4, 5)}
    torch.save({'state_dict': prefixed(state, 'model.') | beside}, tmp_path / 'w.ckpt')
    words = '2 tensors differ): unexpected criterion.weight; unexpected queue: to use only the'
    line = refused(tmp_path / 'w.ckpt', words)
    assert line.endswith("keys under 'model.', give w.ckpt#state_dict/model")
    for entry in ('state_dict/model', 'model'):
        assert_read(f'{tmp_path}/w.ckpt#{entry}', state)


def test_prefixes_that_are_not_known(tmp_path):
    state = state_dict()
    both = prefixed(state, 'module.encoder_q.') | prefixed(state_dict(1), 'module.encoder_k.')
    torch.save({'state_dict': both}, tmp_path / 'moco.pth')
    line = refused(tmp_path / 'moco.pth', 'to use only the keys under')
    assert 'give moco.pth#state_dict/module.encoder_' in line
    assert_read(f'{tmp_path}/moco.pth#encoder_q', state)
    assert_read(f'{tmp_path}/moco.pth#state_dict/module.encoder_k', state_dict(1))
    refused(f'{tmp_path}/moco.pth#encoder_x', "neither an entry nor keys named 'encoder_x'")
    save_file(both, tmp_path / 'moco')
    assert_read(f'{tmp_path}/moco#encoder_q', state)
    words = "contain nothing named 'encoder_x': their keys begin with 'module'"
    refused(f'{tmp_path}/moco#encoder_x', words)


# ------------------------------------------------------------------ several sets


def averaged(state):
    """The state dict of torch.optim.swa_utils.AveragedModel."""
    return {'n_averaged': torch.tensor(5), **prefixed(state, 'module.')}


SETS = {
    'torchvision': lambda a, b: {'model': a, 'model_ema': averaged(b), 'epoch': 1},
    'timm': lambda a, b: {'state_dict': a, 'state_dict_ema': b, 'arch': 'x'},
    'dino': lambda a, b: {
        'student': prefixed(a, 'module.backbone.'),
        'teacher': prefixed(b, 'backbone.'),
    },
    'prefixes': lambda a, b: {
        'state_dict': prefixed(a, 'student.') | prefixed(b, 'teacher.module.')
    },
    'ema prefix': lambda a, b: {'state_dict': prefixed(a, 'model.') | prefixed(b, 'model_ema.')},
}
NAMES = {
    'torchvision': ('model', 'model_ema'),
    'timm': ('state_dict', 'state_dict_ema'),
    'dino': ('student', 'teacher'),
    'prefixes': ('student', 'teacher.module'),
    'ema prefix': ('model', 'model_ema'),
}


@pytest.mark.parametrize('name', SETS)
def test_an_average_is_taken_and_the_other_can_be(tmp_path, name, caplog):
    caplog.set_level(logging.INFO, 'xmixup_jax')
    state, average = state_dict(), state_dict(1)
    torch.save(SETS[name](state, average), tmp_path / 'w.pth')
    plain, ema = NAMES[name]
    assert_read(tmp_path / 'w.pth', average)
    assert (
        f"w.pth contain '{ema}' and '{plain}': using {ema}, a moving average of the weights; "
        f'give w.pth#{plain} for the other'
    ) in caplog.text
    caplog.clear()
    assert_read(f'{tmp_path}/w.pth#{plain}', state)
    assert_read(f'{tmp_path}/w.pth#{ema}', average)
    assert 'for the other' not in caplog.text
    refused(f'{tmp_path}/w.pth#emma', "named 'emma': it contains ", f'{tmp_path}/w.pth cannot')


def test_the_choice_stays_with_the_path(tmp_path):
    torch.save(SETS['timm'](state_dict(), state_dict(1)), tmp_path / 'w.pth')
    found = find_weights(f'{tmp_path}/w.pth#state_dict')
    weights, average = Weights(found, 'resnet10'), Weights(tmp_path / 'w.pth', 'resnet10')
    again = Weights(find_weights(str(weights.path)), 'resnet10')
    assert weights.digest == again.digest != average.digest


def test_an_average_without_statistics_is_not_taken(tmp_path):
    average = {key: t for key, t in state_dict(1).items() if 'running' not in key}
    torch.save({'model': state_dict(), 'ema': average}, tmp_path / 'w.pth')
    assert_read(tmp_path / 'w.pth', state_dict())


def test_sets_of_unknown_names(tmp_path):
    torch.save({'first': state_dict(), 'second': state_dict(1)}, tmp_path / 'w.pth')
    refused(tmp_path / 'w.pth', "2 sets of tensors, 'first' and 'second': choose one", '#first')
    assert_read(f'{tmp_path}/w.pth#second', state_dict(1))


# ------------------------------------------------------------------ key layouts


def to_transformers_vit(network, base='vit.'):
    """The state dict as of transformers' ViTForImageClassification (modeling_vit.py)."""
    made = {}
    for key, tensor in network.state_dict().items():
        if '.attn.qkv.' in key:
            _, i, _, _, leaf = key.split('.')
            parts = zip(('query', 'key', 'value'), tensor.chunk(3), strict=True)
            for name, part in parts:
                made[f'{base}encoder.layer.{i}.attention.attention.{name}.{leaf}'] = part.clone()
            continue
        for ours, theirs in (
            ('cls_token', f'{base}embeddings.cls_token'),
            ('pos_embed', f'{base}embeddings.position_embeddings'),
            ('patch_embed.proj', f'{base}embeddings.patch_embeddings.projection'),
            ('blocks', f'{base}encoder.layer'),
            ('attn.proj', 'attention.output.dense'),
            ('mlp.fc1', 'intermediate.dense'),
            ('mlp.fc2', 'output.dense'),
            ('norm1', 'layernorm_before'),
            ('norm2', 'layernorm_after'),
        ):
            key = key.replace(ours, theirs)
        if key.startswith('norm.'):
            key = f'{base}layer{key}'
        made[key.replace('head.', 'classifier.')] = tensor
    return made


def to_transformers_resnet(network, base='resnet.'):
    """The state dict as of transformers' ResNetForImageClassification (modeling_resnet.py)."""
    kinds = {'conv': 'convolution', 'bn': 'normalization'}
    made = {}
    for key, tensor in network.state_dict().items():
        parts = key.split('.')
        if parts[0] == 'fc':
            name = f'classifier.1.{parts[1]}'
        elif parts[0] in ('conv1', 'bn1'):
            name = f'{base}embedder.embedder.{kinds[parts[0][:-1]]}.{parts[1]}'
        else:
            stage = f'{base}encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}'
            if parts[2] == 'downsample':
                name = f'{stage}.shortcut.{list(kinds.values())[int(parts[3])]}.{parts[4]}'
            else:
                layer = int(parts[2][-1]) - 1
                name = f'{stage}.layer.{layer}.{kinds[parts[2][:-1]]}.{parts[3]}'
        made[name] = tensor
    return made


def to_google(network, heads, begin='', numbers=(0, 1, 2, 3)):
    """Arrays as in google-research/vision_transformer's .npz files."""
    state = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    width = state['cls_token'].shape[-1]
    first, attention, second, mlp = numbers
    made = {
        'cls': state['cls_token'],
        'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': state['patch_embed.proj.bias'],
        'Transformer/posembed_input/pos_embedding': state['pos_embed'],
        'Transformer/encoder_norm/scale': state['norm.weight'],
        'Transformer/encoder_norm/bias': state['norm.bias'],
        'head/kernel': state['head.weight'].T,
        'head/bias': state['head.bias'],
    }
    for i in range(12):
        block, ours = f'Transformer/encoderblock_{i}', f'blocks.{i}'
        for number, norm in ((first, 'norm1'), (second, 'norm2')):
            made[f'{block}/LayerNorm_{number}/scale'] = state[f'{ours}.{norm}.weight']
            made[f'{block}/LayerNorm_{number}/bias'] = state[f'{ours}.{norm}.bias']
        for number, layer in enumerate(('fc1', 'fc2')):
            dense = f'{block}/MlpBlock_{mlp}/Dense_{number}'
            made[f'{dense}/kernel'] = state[f'{ours}.mlp.{layer}.weight'].T
            made[f'{dense}/bias'] = state[f'{ours}.mlp.{layer}.bias']
        attend = f'{block}/MultiHeadDotProductAttention_{attention}'
        weights = np.split(state[f'{ours}.attn.qkv.weight'], 3)
        biases = np.split(state[f'{ours}.attn.qkv.bias'], 3)
        for name, weight, bias in zip(('query', 'key', 'value'), weights, biases, strict=True):
            made[f'{attend}/{name}/kernel'] = weight.T.reshape(width, heads, -1)
            made[f'{attend}/{name}/bias'] = bias.reshape(heads, -1)
        made[f'{attend}/out/kernel'] = state[f'{ours}.attn.proj.weight'].T.reshape(heads, -1, width)
        made[f'{attend}/out/bias'] = state[f'{ours}.attn.proj.bias']
    return {begin + key: array for key, array in made.items()}


@pytest.fixture(scope='module')
def vit():
    """(timm's network, pixels, its logits)."""
    network = randomized(peer('vit_s16', 5, 32))
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network, pixels, network(pixels).numpy()


@pytest.fixture(scope='module')
def compiled():
    graphdef, *_ = make('vit_s16', 32, 5)
    return jax.jit(lambda p, s, x: forward(graphdef, p, s, x, train=False)[0].logits)


def images(pixels):
    return pixels.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize('form', ['transformers', 'google', 'google 2', 'big_vision'])
def test_layouts_of_vision_transformers(tmp_path, vit, compiled, form):
    network, pixels, expected = vit
    path = tmp_path / 'w'
    if form == 'transformers':
        save_file(to_transformers_vit(network), path)
    else:
        forms = {
            'google': {},
            'google 2': {'begin': 'opt/target/'},
            'big_vision': {'begin': 'params/', 'numbers': (0, 0, 1, 0)},
        }
        with path.open('wb') as file:
            np.savez(file, **to_google(network, 6, **forms[form]))
    filled = load_weights(str(path), 'vit_s16', image_size=32)
    close(compiled(filled.params, filled.batch_stats, images(pixels)), expected, 1e-4)


def test_names_that_look_like_prefixes(tmp_path, vit):
    # Keys of transformers' bare networks begin with `encoder.`, as do torchvision's.
    for prefix in ('', 'module.encoder.'):
        torch.save(prefixed(to_transformers_vit(vit[0], base=''), prefix), tmp_path / 'w')
        _, params, _ = make('vit_s16', 32)
        Weights(tmp_path / 'w', 'vit_s16').fill(params, {})


def test_a_layer_before_the_head(tmp_path, vit):
    # Google's first networks on ImageNet-21k have a layer between features and head.
    arrays = to_google(vit[0], 6)
    arrays |= {'pre_logits/kernel': np.zeros((384, 384)), 'pre_logits/bias': np.zeros(384)}
    np.savez(tmp_path / 'w.npz', **arrays)
    weights = Weights(tmp_path / 'w.npz', 'vit_s16')
    assert weights.head is None
    weights.fill(make('vit_s16', 32)[1], {})


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_layout_of_transformers_resnets(tmp_path, name):
    network = randomized(peer(name, 5, 64))
    torch.save(to_transformers_resnet(network), tmp_path / 'pytorch_model.bin')
    expected = {
        key: tensor.numpy()
        for key, tensor in network.state_dict().items()
        if not key.endswith('tracked')
    }
    read = Weights(tmp_path / 'pytorch_model.bin', name).tensors
    assert read.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_logits_of_a_transformers_resnet(tmp_path):
    network = randomized(peer('resnet18', 5, 64))
    torch.save(to_transformers_resnet(network), tmp_path / 'w')
    graphdef, *filled = load_weights(str(tmp_path / 'w'), 'resnet18')
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits = jax.jit(lambda p, s, x: forward(graphdef, p, s, x, train=False)[0].logits)
    with torch.no_grad():
        close(logits(*filled, images(pixels)), network(pixels), 1e-4)


def test_layouts_of_parts_are_refused(tmp_path, vit):
    arrays = to_google(vit[0], 6)
    del arrays['Transformer/encoderblock_3/MultiHeadDotProductAttention_1/key/kernel']
    np.savez(tmp_path / 'w.npz', **arrays)
    with pytest.raises(DataError, match=r'missing blocks\.3\.attn\.qkv\.weight'):
        load_weights(str(tmp_path / 'w.npz'), 'vit_s16', image_size=32)


def test_files_that_are_no_whole_network(tmp_path):
    adapters = {f'base_model.model.{i}.lora_A.weight': torch.ones(2, 2) for i in range(9)}
    save_file(adapters, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(DataError, match=r'these are LoRA adapters; merge them into the network'):
        _, params, _ = make('vit_s16', 32)
        Weights(tmp_path / 'adapter_model.safetensors', 'vit_s16').fill(params, {})
    state = state_dict()
    state['conv1.weight'] = state['conv1.weight'].to(torch.int8)
    torch.save(state, tmp_path / 'w.pth')
    refused(tmp_path / 'w.pth', 'conv1.weight has type int8, not float32')


# ------------------------------------------------------------------ damage


def test_mutated_files_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    seeds = []
    state = {'conv1.weight': torch.ones(2, 2), 'fc.bias': torch.ones(3)}
    for zipped in (True, False):
        for protocol in (2, 4):
            buffer = io.BytesIO()
            saved = {'state_dict': prefixed(state, 'model.'), 'args': AttributeDict(OBJECTS)}
            torch.save(
                saved, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
            )
            seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, **{'embedding/kernel': np.ones((2, 2, 3, 4)), 'head/bias': np.ones(3)})
    seeds.append(buffer.getvalue())
    refusals = 0
    for turn in range(500):
        content = bytearray(seeds[turn % len(seeds)])
        for _ in range(rng.geometric(0.4)):
            place = int(rng.integers(len(content)))
            kind = rng.integers(4)
            if kind == 0:
                content[place] = int(rng.integers(256))
            elif kind == 1:
                content[place] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                del content[place : place + int(rng.integers(1, 9))]
            else:
                content[place:place] = rng.bytes(int(rng.integers(1, 9)))
        (tmp_path / 'w').write_bytes(content)
        try:
            Weights(tmp_path / 'w', 'vit_s16' if turn % len(seeds) == 4 else 'resnet10')
        except DataError as error:
            assert '\n' not in str(error)
            refusals += 1
    assert 50 < refusals < 500
