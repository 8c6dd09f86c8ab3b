"""Validation splits, the choice of the best network, early stopping, and `xmixup finish`."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_sources import write_images

from xmixup_jax import defaults
from xmixup_jax.checks import validate
from xmixup_jax.cli import compare, finish
from xmixup_jax.cli import report as report_command
from xmixup_jax.config import from_stored
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import split_validation
from xmixup_jax.errors import ConfigError, DataError, UserError
from xmixup_jax.predictor import load
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import train_and_evaluate


def rows(workdir):
    with (workdir / 'metrics.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def split(labels, share, seed=0):
    images = np.zeros((len(labels), 2, 2), np.uint8)
    records = Records.from_arrays(images, labels, [str(c) for c in range(labels.max() + 1)])
    config = defaults.get_config()
    config.target.validation_share, config.seed = share, seed
    return records, split_validation(records, config.target, config)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_each_class_gives_its_share_and_keeps_an_image(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    kept = [max(1, round((1 - share) * size)) for size in sizes]
    if kept == sizes:
        with pytest.raises(DataError, match='less than half an image'):
            split(labels, share, seed)
        return
    records, (train, validation) = split(labels, share, seed)
    assert sorted([*train.index, *validation.index]) == sorted(records.index)
    assert np.bincount(train.labels).tolist() == kept
    assert train.class_names == validation.class_names
    _, (again, _) = split(labels, share, seed)
    np.testing.assert_array_equal(train.index, again.index)


def test_the_split_follows_the_seed():
    labels = np.repeat(np.arange(3), 20)
    drawn = [split(labels, 0.3, seed)[1][1].index.tolist() for seed in range(4)]
    assert len(set(map(tuple, drawn))) == 4


@pytest.fixture
def validated(config):
    config.update({'method': 'finetune', 'eval_every': 1, 'steps': 6, 'checkpoint_every': 2})
    config.update({'keep_checkpoints': 5})
    config.target.validation_share = 0.4
    return config


def test_validation_chooses_and_the_test_is_read_once(validated, tmp_path):
    data, reads = open_data(validated), []

    def counted(number):
        reads.append(number)
        return data.test.read(number)

    watched = data._replace(test=replace(data.test, read=counted))
    result = train_and_evaluate(validated, tmp_path, watched)
    assert len(reads) == len(set(reads)) == len(data.test)  # each image once
    scores = {int(row['step']): row for row in rows(tmp_path)}
    assert all(row['test_top1'] == '' for row in scores.values())
    found = [
        (float(row['validation_top1']), -float(row['validation_loss']), -step)
        for step, row in scores.items()
        if row['validation_top1']
    ]
    # The rows lack the validation of the last network.
    best = -max(found)[2]
    assert result['best_step'] in (best, validated.steps)
    assert result['best_by'] == 'validation' and result['validation_images'] == 20
    assert result['train_images'] == 30
    final, kept = (load_file(tmp_path / f'{name}model.safetensors') for name in ('', 'best_'))
    for key in final:
        np.testing.assert_array_equal(final[key], kept[key])
    model = load(tmp_path)
    assert 'on its validation images' in model.describe()
    tested = model.test(data.test)
    assert tested.metrics['top1'] == pytest.approx(result['top1'], abs=1e-9)


@pytest.mark.parametrize('patience', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_patience_stops_a_run_and_a_resumed_one_likewise(validated, pretrained, tmp_path, patience):
    # Nothing changes, so that no network is better than the first.
    validated.update({'patience': patience, 'weights': str(pretrained), 'batch_norm': 'frozen'})
    validated.optimizer.learning_rate = 1e-12
    result = train_and_evaluate(validated, tmp_path / 'run')
    assert (result['best_step'], result['steps']) == (1, 1 + patience)
    assert result['stopped_of'] == 6
    # Killed between the last checkpoint and the result.
    killed = shutil.copytree(tmp_path / 'run', tmp_path / 'killed')
    for name in ('result.json', 'model.safetensors', 'SHA256SUMS'):
        (killed / name).unlink()
    again = train_and_evaluate(validated, killed)
    timed = ('seconds', 'images_per_second', 'first_step_seconds')
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in result.items() if k not in timed
    }
    report_command.report(tmp_path / 'run')
    assert (tmp_path / 'run' / 'report.html').exists()


def stopped(config, tmp_path):
    """A run with checkpoints of steps 2 and 4, and no result."""
    train_and_evaluate(config, tmp_path / 'run')
    workdir = shutil.copytree(tmp_path / 'run', tmp_path / 'stopped')
    shutil.rmtree(workdir / 'checkpoints' / '6')
    for name in ('result.json', 'model.safetensors', 'SHA256SUMS', 'per_class.csv'):
        (workdir / name).unlink()
    return workdir


def test_a_stopped_run_can_be_finished_and_used(config, tmp_path, capsys):
    config.update({'method': 'xmixup', 'checkpoint_every': 2, 'keep_checkpoints': 5})
    config.report = False
    workdir = stopped(config, tmp_path)
    finish.run(['finish', f'--workdir={workdir}'])
    assert '4 of 6 steps' in capsys.readouterr().out
    result = json.loads((workdir / 'result.json').read_text())
    assert (result['steps'], result['stopped_of']) == (4, 6)
    assert (workdir / 'per_class.csv').exists()
    assert load(workdir).test(open_data(config).test).metrics['top1'] == result['top1']
    before = dict(result)
    finish.run(['finish', f'--workdir={workdir}'])  # it is finished
    assert json.loads((workdir / 'result.json').read_text()) == before
    # Without its result, the run can train on.
    (workdir / 'result.json').unlink()
    whole = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert train_and_evaluate(config, workdir)['loss'] == whole['loss']


def test_finish_says_what_is_missing(config, tmp_path):
    with pytest.raises(DataError, match='holds no run'):
        finish.run(['finish', f'--workdir={tmp_path}'])
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    with pytest.raises(DataError, match='has no checkpoint yet'):
        finish.run(['finish', f'--workdir={tmp_path}'])
    with pytest.raises(UserError):
        finish.run(['finish'])


def test_configurations_of_earlier_versions_are_completed(config):
    stored = config.to_dict()
    for key in ('freeze', 'balance', 'patience', 'label_smoothing', 'ema_decay'):
        del stored[key]
    del stored['target']['validation_share'], stored['source']['validation_share']
    assert from_stored(stored).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'patience': 2}, 'needs --config.target.validation_share'),
        ({'patience': 2, 'target.validation_share': 0.2}, 'and --config.eval_every'),
        ({'target.validation_share': 1.0}, 'from 0 to below 1'),
    ],
)
def test_impossible_choices_are_refused(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)


def test_all_images_of_a_folder_can_be_trained_on(config, tmp_path):
    names = [f'{c}/{i}.png' for c in ('ant', 'bee') for i in range(5)]
    write_images(tmp_path / 'photos', names, side=12)
    config.update({'method': 'finetune', 'steps': 2, 'report': True})
    config.target = defaults.dataset(f'folder:{tmp_path}/photos', '', '')
    validate(config, 1)
    result = train_and_evaluate(config, tmp_path / 'run')
    assert (result['train_images'], result['test_images']) == (10, 0)
    assert 'top1' not in result and (tmp_path / 'run' / 'report.html').exists()
    assert load(tmp_path / 'run').class_names == ('ant', 'bee')
    config.eval_every = 1
    with pytest.raises(ConfigError, match='there are no images to test on'):
        validate(config, 1)
    flags = [f'--config.target.{key}=' for key in ('split', 'test_split')]
    with pytest.raises(ConfigError, match='compare needs images to test on'):
        compare.parse(['compare', '--config=digits', f'--workdir={tmp_path}/c', *flags])
