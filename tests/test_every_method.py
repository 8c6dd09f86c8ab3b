"""Whole runs of every method, and the documented way to add one."""

import importlib
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from tests.test_step import one_and_many_devices, random_batch
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.features import images_of
from xmixup_jax.config import validate
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import forward
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights


@pytest.fixture
def weights(config, tmp_path_factory):
    """A network with a head of ten classes, as pre-training would leave it."""
    path = tmp_path_factory.getbasetemp() / 'pretrained.safetensors'
    if not path.exists():
        config.method = 'finetune'
        _, state = step_lib.create_task(config, Sizes(10))
        save_weights(path, config.model.name, state.params, state.batch_stats, {})
    return path


@pytest.mark.parametrize('name', METHODS)
def test_every_method_trains_and_continues_as_if_never_stopped(config, weights, tmp_path, name):
    config.method, config.weights = name, str(weights)
    result = train_and_evaluate(config, tmp_path)
    assert 0 < result['top1'] <= 1 and np.isfinite(result['loss'])
    final = load_file(tmp_path / 'model.safetensors')
    extra = {'xmixup': 10, 'cotrain': 10, 'lwf': 10, 'cotuning': 10, 'smile': 10, 'bituning': 128}
    assert final['fc.bias'].shape == (10 + extra.get(name, 0),)

    (tmp_path / 'result.json').unlink()
    (tmp_path / 'model.safetensors').unlink()
    shutil.rmtree(tmp_path / 'checkpoints' / '6')  # continues from step 4
    again = train_and_evaluate(config, tmp_path)
    assert again['top1'] == result['top1']
    for key, tensor in load_file(tmp_path / 'model.safetensors').items():
        np.testing.assert_array_equal(tensor, final[key])


def test_seqtrain_trains_on_the_most_similar_source_classes_first(config, weights, tmp_path):
    config.method, config.weights = 'seqtrain', str(weights)
    config.seqtrain.num_classes, config.seqtrain.steps = 3, 2
    train_and_evaluate(config, tmp_path)
    auxiliary = load_file(tmp_path / 'auxiliary' / 'model.safetensors')
    assert auxiliary['fc.bias'].shape == (3,)
    assert not np.array_equal(auxiliary['conv1.weight'], load_file(weights)['conv1.weight'])


def test_cotuning_translates_by_the_pretrained_head(config, records, weights, tmp_path):
    config.method, config.weights, config.cotuning.temperature = 'cotuning', str(weights), 2.0
    train_and_evaluate(config, tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    table = checkpoints.restore_constants(checkpoints.restore_meta())['relationship']
    checkpoints.close()

    config.method = 'finetune'  # whose head is the one in the weights file
    task, state = step_lib.create_task(config, Sizes(10))
    images, labels = images_of(config, records[0])
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    probabilities = scipy.special.softmax(np.asarray(outputs.logits) / 2.0, axis=1)
    expected = np.stack([probabilities[labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['finetune', 'lwf'])
def test_a_warm_head_begins_as_logistic_regression(config, records, weights, tmp_path, name):
    config.method, config.weights, config.warm_head = name, str(weights), True
    config.optimizer.learning_rate = 1e-12
    train_and_evaluate(config, tmp_path)
    head = load_file(tmp_path / 'model.safetensors')

    config.method = 'finetune'
    task, state = step_lib.create_task(config, Sizes(10))  # the network of the weights file
    images, labels = images_of(config, records[0])
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    fitted = LogisticRegression(max_iter=1000).fit(np.asarray(outputs.features), labels)
    # Where the solver stops depends on rounding: 0.0033 of 5.77 apart on one kind of processor.
    close = {'atol': 2e-3, 'rtol': 1e-3}
    np.testing.assert_allclose(head['fc.weight'][:10], fitted.coef_, **close)
    np.testing.assert_allclose(head['fc.bias'][:10], fitted.intercept_, **close)
    pretrained = load_file(weights)['fc.weight'][: len(head['fc.weight']) - 10]
    np.testing.assert_allclose(head['fc.weight'][10:], pretrained, atol=1e-6)
    assert len(pretrained) == (10 if name == 'lwf' else 0)


@pytest.mark.parametrize('name', ['lwf', 'cotuning', 'smile'])
def test_methods_that_continue_a_head_need_one(config, tmp_path, name):
    config.method = name
    with pytest.raises(ConfigError, match=r'fc\.weight'):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    'name', ['bss', 'dtnh', 'mixup', 'cutmix', 'stochnorm', 'bituning', 'smile', 'mars', 'mmd']
)
def test_one_and_eight_devices_give_the_same_update(config, name):
    """The methods that look at the whole batch at once, or draw once for all of it."""
    config.method = name
    sizes = Sizes(10, 10, 10)
    task, state = step_lib.create_task(config, sizes)
    reference = {'params': state.params, 'batch_stats': state.batch_stats}
    if name == 'bituning':
        rng = np.random.default_rng(0)
        features = state.params['fc']['kernel'].shape[0]
        state.memory = {
            'params': state.params,
            'h': rng.normal(size=(10, 4, features + 1)).astype(np.float32),
            'z': rng.normal(size=(10, 4, 128)).astype(np.float32),
            'next': np.zeros(10, np.int32),
        }
    if name == 'smile':
        state.memory = {'params': state.params}
    batches = [
        {key: v for key, v in random_batch(16, i).items() if not key.startswith('source_')}
        for i in range(2)
    ]
    (one, one_metrics), (eight, eight_metrics) = one_and_many_devices(
        task, reference, state, batches
    )
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, one.params, eight.params)
    jax.tree.map(close, one.memory, eight.memory)
    jax.tree.map(close, one_metrics, eight_metrics)


def test_the_documented_example_adds_a_method(config, tmp_path, monkeypatch):
    text = Path('docs/methods.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    module, line = blocks[0], blocks[1].strip()
    code = module.split('"""', 2)[2]
    assert len([row for row in code.splitlines() if row.strip()]) <= 10
    path = tmp_path / 'smoothing.py'
    path.write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    added = eval(f'{{{line}}}', {'smoothing': importlib.import_module('smoothing')})
    monkeypatch.setitem(METHODS, 'smoothing', added['smoothing'])

    parsed, _ = parse_flags(
        ['main', '--config=configs/digits.py', '--config.smoothing.epsilon=0.2']
    )
    assert parsed.smoothing.epsilon == 0.2
    validate(parsed, 8)
    config.unlock()
    config.smoothing = parsed.smoothing
    config.lock()
    config.method = 'smoothing'
    result = train_and_evaluate(config, tmp_path / 'run')
    config.method = 'finetune'
    plain = train_and_evaluate(config, tmp_path / 'plain')
    assert result['method'] == 'smoothing'
    assert result['loss'] != plain['loss']
