"""Damage to any file of a run is noticed or harmless, and never changes the result."""

import errno
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from fault_runs import rows

from xmixup_jax.compute import step as step_lib
from xmixup_jax.errors import ConfigError, UserError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.run.workdir import damaged_files
from xmixup_jax.weights.files import save_weights

RNG = np.random.default_rng()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    bit = int(RNG.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: int(RNG.integers(path.stat().st_size))])


@pytest.fixture
def config(config):
    config.update({'steps': 6, 'checkpoint_every': 2, 'keep_checkpoints': 3})
    return config


@pytest.fixture
def weights(config, tmp_path):
    """A network with a head of ten classes."""
    plain = config.copy_and_resolve_references()
    plain.method = 'finetune'
    _, state = step_lib.create_task(plain, Sizes(10))
    save_weights(tmp_path / 'w', config.model.name, state.params, state.batch_stats, {})
    return tmp_path / 'w'


def interrupt(workdir):
    """Turns a finished run into one that was killed after step 4."""
    for name in ('result.json', 'SHA256SUMS', 'model.safetensors'):
        (workdir / name).unlink()
    shutil.rmtree(workdir / 'checkpoints' / '6')


def damages(names, number):
    """Draws pairs of a file and a kind of damage; none is repeated before all have occurred.

    Yields:
      (file, damage).
    """
    pairs = list(itertools.product(names, (cut, flip_a_bit)))
    for turn in range(-(-number // len(pairs))):
        for i in RNG.permutation(len(pairs))[: number - turn * len(pairs)]:
            yield pairs[i]


def files(folder):
    """The non-empty files in a folder."""
    found = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.stat().st_size]
    return [path.relative_to(folder) for path in found]


def warnings(caplog):
    return ' '.join(r.getMessage() for r in caplog.records if r.name == 'xmixup_jax')


def count(outcomes, record_property, what):
    record_property(
        f'damaged files of {what}',
        f'{outcomes.total()}: {outcomes["noticed"]} noticed, {outcomes["harmless"]} without effect',
    )


@pytest.mark.slow
@pytest.mark.parametrize(('method', 'number'), [('xmixup', 8), ('delta', 4)])
def test_files_of_an_unfinished_run(
    config, weights, tmp_path, caplog, faults, record_property, method, number
):
    """DELTA has constants, which are saved once, not in every checkpoint."""
    config.method, config.eval_every = method, 2
    config.weights = str(weights)
    begun, workdir = tmp_path / 'begun', tmp_path / 'run'
    train_and_evaluate(config, begun)
    expected = (begun / 'model.safetensors').read_bytes()
    expected_rows = rows(begun)
    interrupt(begun)
    names = [name for name in files(begun) if method == 'xmixup' or name.parts[0] == 'constants']
    assert len(names) > 4
    outcomes = Counter()
    # Damage to the largest file that the run resumes from must be noticed.
    needed = [name for name in names if name.parts[:2] == ('checkpoints', '4')] or names
    largest = max(needed, key=lambda name: (begun / name).stat().st_size)
    for name, damage in ((largest, cut), *damages(names, number * faults - 1)):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(begun, workdir)
        damage(workdir / name)
        caplog.clear()
        try:
            train_and_evaluate(config, workdir)
        except UserError as error:
            words = str(error)
            assert '\n' not in words
        else:
            words = warnings(caplog)
            assert (workdir / 'model.safetensors').read_bytes() == expected, (name, damage)
            assert rows(workdir) == expected_rows
        if words:
            place = name.parts[0] if name.parts[0] != 'checkpoints' else '/'.join(name.parts[:2])
            assert place in words, (name, damage, words)
        outcomes['noticed' if words else 'harmless'] += 1
    count(outcomes, record_property, f'an unfinished run ({method})')
    assert outcomes['noticed']


def test_files_of_a_finished_run(finished_run, tmp_path, caplog, faults, record_property):
    config, begun, result = finished_run
    workdir = tmp_path / 'run'
    expected = (begun / 'model.safetensors').read_bytes()
    outcomes = Counter()
    # A finished run does not read its other files any more.
    names = [name for name in files(begun) if len(name.parts) == 1 and name.name != '.lock']
    assert {name.suffix for name in names} == {'.json', '.csv', '.safetensors', ''}
    for name, damage in damages(names, 4 * faults):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(begun, workdir)
        damage(workdir / name)
        caplog.clear()
        again = train_and_evaluate(config, workdir)
        for key in ('top1', 'loss', 'best_top1', 'best_step', 'steps'):
            assert again[key] == result[key]
        assert (workdir / 'model.safetensors').read_bytes() == expected
        assert str(workdir) in warnings(caplog), (name, damage)
        outcomes['noticed'] += 1
    count(outcomes, record_property, 'a finished run')


def test_a_damaged_list_of_digests(finished_run, tmp_path, caplog):
    """Whatever the damage, the best network stays, since no checkpoint has it."""
    config, begun, result = finished_run
    workdir = tmp_path / 'run'
    whole = (begun / 'SHA256SUMS').read_bytes()
    best = whole.index(b'best_model') - 66  # where its line begins
    flipped = whole[:best] + bytes([whole[best] ^ 1]) + whole[best + 1 :]
    for content in (b'', whole[: best - 9], whole[:-1], flipped, b'\xff' + whole):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(begun, workdir)
        (workdir / 'SHA256SUMS').write_bytes(content)
        caplog.clear()
        again = train_and_evaluate(config, workdir)
        for key in ('top1', 'best_top1', 'best_step', 'best_loss', 'steps', 'images_per_second'):
            if key != 'images_per_second' or b'result.json' in content:
                assert again[key] == result[key]
        assert f'{workdir}/SHA256SUMS is not as the run wrote it' in warnings(caplog)
        for name in ('model.safetensors', 'best_model.safetensors'):
            assert (workdir / name).read_bytes() == (begun / name).read_bytes()
        assert damaged_files(workdir) == []


def test_no_checkpoint_is_whole_or_readable(finished_run, monkeypatch):
    """The run does not silently start over, and intact files stay in place."""
    config, tmp_path, _ = finished_run
    interrupt(tmp_path)

    def refuse(checkpoints, step):
        raise PermissionError(errno.EACCES, 'Permission denied', 'meta')

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, '_read_meta', refuse)
        with pytest.raises(UserError, match=r'cannot be read now \(Permission denied\)'):
            train_and_evaluate(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']
    for path in (tmp_path / 'checkpoints').glob('*/meta/metadata'):
        cut(path)
    with pytest.raises(
        UserError, match=r'no checkpoint in .* can be read; all were moved to damaged/'
    ):
        train_and_evaluate(config, tmp_path)
    kept = (tmp_path / 'damaged' / 'checkpoints').iterdir()
    assert sorted(path.name.split('-')[0] for path in kept) == ['2', '4']
    assert train_and_evaluate(config, tmp_path)['steps'] == 6


def test_a_finished_run_can_be_extended(finished_run):
    config, tmp_path, first = finished_run
    config.update({'steps': 8, 'allow_changes': True})
    assert train_and_evaluate(config, tmp_path)['steps'] == 8
    assert json.loads((tmp_path / 'result-0.json').read_text()) == first
    assert [int(row['step']) for row in rows(tmp_path)] == [2, 4, 6, 8]
    assert train_and_evaluate(config, tmp_path)['steps'] == 8
    config.steps = 7
    with pytest.raises(ConfigError, match=r'config.steps=7: .* has already done 8'):
        train_and_evaluate(config, tmp_path)
    config.update({'steps': 8, 'batch_size': 32})
    with pytest.raises(ConfigError, match=r'config.batch_size cannot change in'):
        train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_weights_and_caches(config, weights, tmp_path, caplog, faults, record_property):
    """The network on disk, the class features and the index of labels."""
    cache = tmp_path / 'cache'
    config.update({'cache_dir': str(cache), 'weights': str(weights), 'steps': 2})
    train_and_evaluate(config, tmp_path / 'first')
    expected = (tmp_path / 'first' / 'model.safetensors').read_bytes()
    whole = weights.read_bytes()
    kept = {path: path.read_bytes() for path in cache.rglob('*.npz')}
    assert {path.parent.name for path in kept} == {'labels', 'features'}
    outcomes = Counter()
    for path, damage in damages([weights, *kept], 4 * faults):
        for file, content in kept.items():
            file.write_bytes(content)
        weights.write_bytes(whole)
        damage(path)
        caplog.clear()
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        try:
            train_and_evaluate(config, tmp_path / 'run')
        except UserError as error:
            words = str(error)
        else:
            words = warnings(caplog)
            final = (tmp_path / 'run' / 'model.safetensors').read_bytes()
            assert final == expected, (path, damage)
        assert not words or str(path) in words
        outcomes['noticed' if words else 'harmless'] += 1
    count(outcomes, record_property, 'the cache')


@pytest.mark.filterwarnings('ignore:overflow encountered in cast')  # of the learning rate
def test_a_value_that_is_no_number_is_never_saved(config, tmp_path):
    """The loss of the step is still finite, but the parameters after it are not."""
    config.optimizer.learning_rate = 1e39  # infinite in float32
    config.update({'checkpoint_every': 1, 'log_every': 1})
    with pytest.raises(UserError, match=r'not finite after step 1, .*\(there are: 0\)'):
        train_and_evaluate(config, tmp_path)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['0']
    config.optimizer.learning_rate = 1e-3
    with pytest.raises(UserError, match=r'\(config.optimizer.learning_rate: 1e\+39 -> 0.001\)'):
        train_and_evaluate(config, tmp_path)
    config.allow_changes = True
    assert np.isfinite(train_and_evaluate(config, tmp_path)['loss'])
    assert (
        json.loads((tmp_path / 'config-0.json').read_text())['optimizer']['learning_rate'] == 1e39
    )


@pytest.mark.parametrize('name', ['config.json', 'metrics.csv', 'match.json', 'environment.json'])
def test_a_damaged_record_of_a_finished_run_is_written_again(finished_run, name):
    config, workdir, result = finished_run
    whole = (workdir / name).read_bytes()
    (workdir / name).write_bytes(whole + b'\n')
    again = train_and_evaluate(config, workdir)
    assert (again['top1'], again['steps']) == (result['top1'], result['steps'])
    assert damaged_files(workdir) == []
    if name != 'environment.json':  # which names another process now
        assert (workdir / name).read_bytes() == whole


def test_a_change_that_cannot_be_resumed_leaves_the_run_as_it_was(finished_run):
    config, workdir, result = finished_run
    config.optimizer.name, config.allow_changes = 'adamw', True
    with pytest.raises(UserError, match='belongs to another network or optimiser'):
        train_and_evaluate(config, workdir)
    config.optimizer.name, config.allow_changes = 'sgd', False
    assert train_and_evaluate(config, workdir)['top1'] == result['top1']
    assert damaged_files(workdir) == []


def test_a_best_network_of_another_run_is_not_taken(finished_run):
    config, workdir, _ = finished_run
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'result.json').unlink()
    config.update({'steps': 2, 'eval_every': 0})
    assert 'best_top1' not in train_and_evaluate(config, workdir)
    assert list((workdir / 'damaged').glob('best_model.safetensors-*'))
