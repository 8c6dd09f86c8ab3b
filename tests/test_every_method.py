"""Whole runs of every method, and the lists of methods in documentation and benchmarks."""

import itertools
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
import scipy.special
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from benchmarks.tune import GRIDS
from tests.test_step import one_and_many_devices, random_batch
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.features import images_of
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS, seqtrain
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced
from xmixup_jax.methods.options import options_table
from xmixup_jax.methods.parts import with_linear_head
from xmixup_jax.models import forward
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.train import train_and_evaluate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'methods' / 'index.md'


# Whole runs of these are slow tests: quick tests run a training step of each, and other methods
# have the same kind of state.
ALIKE = ('l2sp', 'dtnh', 'bss', 'mars', 'mixup', 'cutmix', 'mmd')


@pytest.mark.parametrize('name', [name for name in METHODS if name not in ALIKE])
def test_methods_train_and_continue_as_if_never_stopped(config, pretrained, tmp_path, name):
    config.method, config.weights = name, str(pretrained)
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


EVERYTHING = {
    'freeze': '1',
    'ema_decay': 0.9,
    'label_smoothing': 0.1,
    'balance.weights': 'inverse',
    'augment.policy': 'trivialaugment',
    'augment.erasing': 0.5,
    'test_views': 2,
    'fit': 'pad',
    'optimizer.name': 'adamw',
    'optimizer.layer_decay': 0.7,
    'target.validation_share': 0.2,
    'eval_every': 2,
    'patience': 2,
}


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=() if n == 'smile' else pytest.mark.slow) for n in METHODS]
)
def test_every_method_works_with_all_options(config, pretrained, tmp_path, name):
    """All options at once; a run that lost its result and last checkpoint ends the same."""
    config.method, config.weights = name, str(pretrained)
    config.update_from_flattened_dict(EVERYTHING)
    whole = train_and_evaluate(config, tmp_path / 'whole')
    assert whole['validation_images'] == 10 and whole['best_by'] == 'validation'
    assert np.isfinite([whole['loss'], whole['ema_loss'], whole['best_loss']]).all()
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'checkpoints' / str(whole['steps']))
    (tmp_path / 'again' / 'result.json').unlink()
    again = train_and_evaluate(config, tmp_path / 'again')
    same = ('loss', 'ema_loss', 'best_loss', 'best_step', 'steps')
    assert [again[key] for key in same] == [whole[key] for key in same]
    before, after = load_file(pretrained), load_file(tmp_path / 'again' / 'model.safetensors')
    for key in before:
        if key.startswith(('conv1', 'bn1', 'layer1')):
            np.testing.assert_array_equal(before[key], after[key])


def test_seqtrain_trains_on_the_most_similar_source_classes_first(config, pretrained, tmp_path):
    config.method, config.weights = 'seqtrain', str(pretrained)
    config.seqtrain.num_classes, config.seqtrain.steps = 3, 2
    train_and_evaluate(config, tmp_path)
    auxiliary = load_file(tmp_path / 'auxiliary' / 'model.safetensors')
    assert auxiliary['fc.bias'].shape == (3,)
    assert not np.array_equal(auxiliary['conv1.weight'], load_file(pretrained)['conv1.weight'])


def test_cotuning_translates_by_the_pretrained_head(config, records, pretrained, tmp_path):
    config.method, config.weights, config.cotuning.temperature = 'cotuning', str(pretrained), 2.0
    train_and_evaluate(config, tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    table = checkpoints.restore_constants(checkpoints.restore_meta())['relationship']
    checkpoints.close()

    config.method = 'finetune'  # to compute the outputs of the head in the weights file
    task, state = step_lib.create_task(config, Sizes(10))
    images, labels = images_of(config, records[0])
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    probabilities = scipy.special.softmax(np.asarray(outputs.logits) / 2.0, axis=1)
    expected = np.stack([probabilities[labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['finetune', 'lwf'])
def test_a_warm_head_begins_as_logistic_regression(config, records, pretrained, tmp_path, name):
    config.method, config.weights, config.warm_head = name, str(pretrained), True
    config.optimizer.learning_rate = 1e-12
    train_and_evaluate(config, tmp_path)
    head = load_file(tmp_path / 'model.safetensors')

    config.method = 'finetune'
    task, state = step_lib.create_task(config, Sizes(10))  # the network of the weights file
    images, labels = images_of(config, records[0])
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    fitted = LogisticRegression(max_iter=1000).fit(np.asarray(outputs.features), labels)
    # Rounding affects where the solver stops: by 0.0033 of 5.77 on one kind of processor.
    close = {'atol': 2e-3, 'rtol': 1e-3}
    np.testing.assert_allclose(head['fc.weight'][:10], fitted.coef_, **close)
    np.testing.assert_allclose(head['fc.bias'][:10], fitted.intercept_, **close)
    continued = load_file(pretrained)['fc.weight'][: len(head['fc.weight']) - 10]
    np.testing.assert_allclose(head['fc.weight'][10:], continued, atol=1e-6)
    assert len(continued) == (10 if name == 'lwf' else 0)


def test_seqtrains_warm_head_is_of_the_network_trained_on_the_source(
    config, records, pretrained, tmp_path, monkeypatch
):
    config.method, config.weights, config.warm_head = 'seqtrain', str(pretrained), True
    config.seqtrain.num_classes, config.seqtrain.steps, config.steps = 3, 2, 1
    begun = []

    def record(setup):
        begun.append(with_linear_head(setup))
        return begun[-1]

    monkeypatch.setattr(seqtrain, 'with_linear_head', record)
    train_and_evaluate(config, tmp_path)
    (state,) = begun
    auxiliary = load_file(tmp_path / 'auxiliary' / 'model.safetensors')['conv1.weight']
    np.testing.assert_array_equal(state.params['conv1']['kernel'].transpose(3, 2, 0, 1), auxiliary)

    config.method = 'finetune'
    task, _ = step_lib.create_task(config, Sizes(10))
    images, labels = images_of(config, records[0])
    network = task.graphdef, state.params, state.batch_stats
    features = np.asarray(forward(*network, images, train=False)[0].features)
    fitted = LogisticRegression(max_iter=1000).fit(features, labels)
    head = state.params['fc']
    np.testing.assert_allclose(head['kernel'], fitted.coef_.T, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(head['bias'], fitted.intercept_, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize('name', ['lwf', 'cotuning', 'smile'])
def test_methods_that_continue_a_head_need_one(config, tmp_path, name):
    config.method = name
    with pytest.raises(ConfigError, match=r'fc\.weight'):
        train_and_evaluate(config, tmp_path)


@pytest.mark.devices
@pytest.mark.parametrize(
    'name',
    # One of each kind: uses all features, draws once for all, has a memory, changes the new state.
    ['bss', 'mixup', 'cutmix', 'bituning', 'mars', 'mmd']
    + [pytest.param(name, marks=pytest.mark.slow) for name in ('dtnh', 'stochnorm', 'smile')],
)
def test_one_and_many_devices_give_the_same_update(config, name):
    """For the methods that use the whole batch at once, or draw once for all of it."""
    config.method = name
    sizes = Sizes(10, 10, 10)
    task, state = step_lib.create_task(config, sizes)
    reference = {'params': state.params, 'batch_stats': state.batch_stats}
    reference = with_traced(reference, config)
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
    (one, one_metrics), (many, many_metrics) = one_and_many_devices(task, reference, state, batches)
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, one.params, many.params)
    jax.tree.map(close, one.memory, many.memory)
    jax.tree.map(close, one_metrics, many_metrics)


def rows_of(header):
    """The names in the first column of a table on the page about methods."""
    lines = PAGE.read_text().splitlines()
    rows = itertools.takewhile(lambda line: line.startswith('|'), lines[lines.index(header) + 2 :])
    return [re.match(r'\| \[?`(\w+)`', row)[1] for row in rows]


def test_the_page_about_methods_has_all_of_them():
    assert rows_of('| name | paper | beside the cross-entropy on the target |') == list(METHODS)
    public = rows_of('| method | public code | departures here |')
    assert set(METHODS) - set(public) == {'finetune', 'xmixup', 'seqtrain', 'dtnh'}
    assert set(public) < set(METHODS)


@pytest.mark.parametrize('name', METHODS)
def test_each_method_has_a_page(name):
    text = (PAGE.parent / f'{name}.md').read_text()
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.DOTALL), re.M)
    parts = ['Formula', 'In a picture', 'Options', "The authors' code and this one"]
    assert headings[1:] == [*parts, 'What was measured']
    assert text.count('$$') >= 2 and text.count('$') % 2 == 0
    assert (f'_help/options_{name}.md' in text) == bool(METHODS[name].options)
    ((alt, picture),) = re.findall(r'!\[(.*?)\]\((.*?)\)', text)
    drawn = PAGE.parent / picture
    assert alt and drawn.name == f'{name}.png' and drawn.stat().st_size < 60_000
    assert f'\n{name}\n' in PAGE.read_text()  # in the list of pages


def test_the_page_about_methods_says_what_they_need():
    text = ' '.join(PAGE.read_text().split())
    needing = [n for n, m in METHODS.items() if m.needs_head(ConfigDict(m.defaults))]
    assert f'`{needing[0]}`, `{needing[1]}` and `{needing[2]}` continue the head' in text
    assert len(needing) == 3
    training = ' '.join((ROOT / 'docs' / 'howto' / 'training.md').read_text().split())
    (listed,) = re.findall(r'train on mixed images or on source images \((.*?)\)', training)
    changing = {name for name, method in METHODS.items() if method.changes_images}
    assert set(re.findall(r'`(\w+)`', listed)) == changing


def test_the_table_of_options_has_all_of_them():
    table = options_table({name: method.options for name, method in METHODS.items()})
    listed = [re.findall(r'`([^`]*)`', row)[0] for row in table.splitlines()[2:]]
    assert listed == [f'{name}.{key}' for name, method in METHODS.items() for key in method.options]
    assert '| `xmixup.alpha` | `0.2` | positive, below 2\\*\\*32 | lam ~ Beta(' in table
    assert '_help/options.md' in PAGE.read_text()


def test_the_notebook_shows_every_method():
    notebook = nbformat.read(ROOT / 'notebooks' / 'method_tour.ipynb', as_version=4)
    text = ''.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')
    assert set(METHODS) <= set(re.findall(r'`(\w+)`', text))


def test_every_method_has_values_to_tune():
    assert set(GRIDS) == set(METHODS)
    for name, (key, values) in GRIDS.items():
        section, _, option = key.partition('.')
        assert len(set(values)) == 3
        if name == 'finetune':
            assert key == 'optimizer.learning_rate'
            continue
        assert section == name
        described = METHODS[name].options[option]
        assert all(described.holds(value) for value in values)
        if name != 'seqtrain':  # its default means as many steps as on the target
            assert values[0] == described.default


def test_methods_do_without_scikit_learn_until_they_fit_a_classifier():
    code = 'import sys, xmixup_jax.methods.parts; print("sklearn" in sys.modules)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == 'False\n'
