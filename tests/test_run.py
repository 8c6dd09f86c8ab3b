"""Whole runs: in this process on simulated devices, and in processes with one device."""

import csv
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from environment import HANGS, one_device
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event

from xmixup_jax.cli import flags, program, train
from xmixup_jax.config import digest, own_run, pretrain_config
from xmixup_jax.devices import chosen_precision
from xmixup_jax.errors import ConfigError, DataError, UserError
from xmixup_jax.files import write_json
from xmixup_jax.methods.base import Sizes
from xmixup_jax.run import loop
from xmixup_jax.run.checkpoint import Checkpoints, Meta
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.run.workdir import locked


def rows(workdir):
    with (workdir / 'metrics.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def tensorboard_scalars(workdir):
    """(tag, step) of every scalar; the records are length, checksum, event, checksum."""
    found = []
    for path in (workdir / 'tensorboard').iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_run_from_source_training_to_result(config, tmp_path):
    config.weights = 'source'
    config.pretrain.steps = 100
    config.model.width = 8
    config.eval_every = 3
    config.optimizer.learning_rate = 0.1  # of six steps
    result = train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / 'result.json').read_text()) == result
    assert (result['method'], result['seed'], result['steps']) == ('xmixup', 0, 6)
    assert result['test_images'] == 1747
    assert 0.15 < result['top1'] <= 1
    assert result['images_per_second'] > 0
    assert result['seconds'] > 0
    assert json.loads((tmp_path / 'config.json').read_text()) == config.to_dict()
    assert [int(row['step']) for row in rows(tmp_path)] == [2, 3, 4, 6]
    assert [row['test_top1'] != '' for row in rows(tmp_path)] == [False, True, False, False]
    assert {('loss', 4), ('top1', 6), ('test_top1', 3)} <= set(tensorboard_scalars(tmp_path))
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()) == [
        '4',
        '6',
    ]
    match = json.loads((tmp_path / 'match.json').read_text())
    assert [row['target'] for row in match] == [str(i) for i in range(10)]
    # The head holds ten target and ten source classes.
    assert load_file(tmp_path / 'model.safetensors')['fc.weight'].shape == (20, 16)

    before = (tmp_path / 'metrics.csv').read_bytes()
    assert train_and_evaluate(config, tmp_path) == result
    assert (tmp_path / 'metrics.csv').read_bytes() == before
    config.xmixup.alpha = 0.3
    with pytest.raises(ConfigError, match=r'\(config.xmixup.alpha: 0.2 -> 0.3\)'):
        train_and_evaluate(config, tmp_path)

    # The network is already trained on the source; a second experiment finds it.
    trained = list(Path(config.cache_dir).glob('pretrained/mnist5k-resnet6-*/result.json'))
    stamps = [path.stat().st_mtime_ns for path in trained]
    config.method = 'finetune'
    assert train_and_evaluate(config, tmp_path / 'second')['method'] == 'finetune'
    assert [path.stat().st_mtime_ns for path in trained] == stamps


def test_missing_data_and_weights_are_named_together(config, tmp_path):
    config.source.name, config.target.name = 'imagenet2012', 'fgvc_aircraft'
    config.weights = str(tmp_path / 'none.safetensors')
    with pytest.raises(DataError) as info:
        train_and_evaluate(config, tmp_path / 'run')
    for words in ('fgvc_aircraft is not prepared', 'ILSVRC2012_img_train.tar', 'none.safetensors'):
        assert words in str(info.value)
    assert not (tmp_path / 'run').exists()


def test_diverged_run_stops(config, tmp_path):
    config.optimizer.learning_rate = 1e20
    with pytest.raises(
        UserError, match=r'the loss is (nan|inf).*lower config.optimizer.learning_rate'
    ):
        train_and_evaluate(config, tmp_path)


def test_more_target_than_source_classes(config, tmp_path):
    config.match.classes_per_target = 2
    with pytest.raises(ConfigError, match=r'at least 10 x 2 source classes, but the source has 10'):
        train_and_evaluate(config, tmp_path)


def test_a_work_directory_has_one_run_at_a_time(config, tmp_path):
    holder = rf'another run \(host {socket.gethostname()}, pid {os.getpid()}\) is writing'
    with locked(tmp_path), pytest.raises(UserError, match=holder):
        train_and_evaluate(config, tmp_path)


ENVIRONMENT = one_device()


def command(config, workdir, **values):
    given = {'data_dir': config.data_dir, 'cache_dir': config.cache_dir, 'weights': ''}
    given |= {'report': False} | values
    return [
        sys.executable,
        '-m',
        'xmixup_jax.main',
        '--config=configs/digits.py',
        f'--workdir={workdir}',
        *(f'--config.{key}={value}' for key, value in given.items()),
    ]


def finish(args, code=0):
    done = subprocess.run(args, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr
    return done


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())


def test_checkpoints_keep_their_distance_in_time(monkeypatch):
    now, shared = [100.0], []
    monkeypatch.setattr(loop, 'broadcast', lambda value: shared.append(value) or value)
    timer = loop.CheckpointTimer(60, lambda: now[0])
    due = []
    for now[0] in (159.9, 160, 200):
        due.append(timer.is_due())
    timer.saved()
    for now[0] in (259, 261):
        due.append(timer.is_due())
    assert due == [False, True, True, False, True]
    assert shared == due  # every process hears each answer


def test_rows_are_the_same_however_often_a_run_saves(config, tmp_path):
    config.update({'method': 'finetune', 'steps': 8, 'log_every': 3, 'keep_checkpoints': 9})
    config.checkpoint_every = 2
    train_and_evaluate(config, tmp_path / 'often')
    config.checkpoint_seconds = 1e6
    train_and_evaluate(config, tmp_path / 'once')
    assert saved_steps(tmp_path / 'often') == [0, 2, 4, 6, 8]
    assert saved_steps(tmp_path / 'once') == [0, 8]
    often, once = (rows(tmp_path / name) for name in ('often', 'once'))
    for row in (*often, *once):
        del row['images_per_second']
    assert often == once and [row['step'] for row in once] == ['2', '3', '4', '6', '8']


def test_a_run_keeps_the_precision_that_it_began_with(config, tmp_path, caplog):
    config.update({'method': 'finetune', 'precision': 'auto'})
    train_and_evaluate(config, tmp_path / 'cpu')
    stored = json.loads((tmp_path / 'cpu' / 'config.json').read_text())
    assert stored['precision'] == 'float32'
    config.precision = 'bfloat16'
    result = train_and_evaluate(config, tmp_path / 'narrow')
    config.precision = 'auto'
    assert 'Precision' not in caplog.text
    with caplog.at_level('INFO', 'xmixup_jax'):
        assert train_and_evaluate(config, tmp_path / 'narrow') == result
    assert 'Precision: bfloat16 (automatic choice)' in caplog.text
    config.precision = 'float32'
    with pytest.raises(ConfigError, match=r"config\.precision: 'bfloat16' -> 'float32'"):
        train_and_evaluate(config, tmp_path / 'narrow')


@pytest.mark.parametrize(
    ('backend', 'expected'), [('cpu', 'float32'), ('gpu', 'bfloat16'), ('tpu', 'bfloat16')]
)
def test_auto_precision_suits_the_devices(config, monkeypatch, backend, expected):
    before = digest(pretrain_config(config))
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    assert chosen_precision('auto') == expected
    assert chosen_precision('float32') == 'float32'
    # Networks that were pre-trained with the other precision are others.
    assert (digest(pretrain_config(config)) == before) == (backend == 'cpu')


@pytest.mark.slow
def test_stopped_and_continued_is_the_undisturbed_run(config, records, tmp_path):
    """Stopped by SIGTERM, from the command line; tests/faults kills runs in many ways."""
    values = {'model.width': 4, 'steps': 200, 'checkpoint_every': 50, 'log_every': 5}
    undisturbed, stopped = tmp_path / 'undisturbed', tmp_path / 'stopped'
    finish(command(config, undisturbed, **values))
    process = subprocess.Popen(
        command(config, stopped, **values), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + HANGS
    while not (stopped / 'metrics.csv').exists() or len(rows(stopped)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 75
    assert 'run the same command to resume' in stderr
    assert not (stopped / 'result.json').exists()

    done = finish(command(config, stopped, **values))
    assert done.stdout.startswith('xmixup  top1 ')
    expected = (undisturbed / 'model.safetensors').read_bytes()
    assert (stopped / 'model.safetensors').read_bytes() == expected
    steps = [int(row['step']) for row in rows(stopped)]
    # A checkpoint between two logged steps has its own row.
    assert steps == sorted(set(steps)) and set(steps) >= set(range(5, 201, 5))


def test_a_mistake_ends_in_one_line(config, tmp_path):
    done = finish(command(config, tmp_path / 'run', nonsense=1), 2)
    assert done.stderr.startswith('xmixup: --config.nonsense=1: there is no such key')
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('workdir', 'values', 'words'),
    [
        ('run', {'target.name': 'uci_digit'}, 'did you mean uci_digits?'),
        ('run', {'cache_dir': '/proc/cache', 'weights': 'source'}, '/proc/cache'),
        ('/proc/run', {}, 'cannot write into /proc/run'),
    ],
)
def test_mistakes_within_this_process(
    config, records, tmp_path, monkeypatch, workdir, values, words
):
    def fail(message, code):
        raise SystemExit(code, message)

    monkeypatch.setattr(program, 'fail', fail)
    monkeypatch.setattr(flags, 'setup', lambda cache_dir: None)
    arguments = command(config, tmp_path / workdir, **values)[3:]
    with pytest.raises(SystemExit) as info:
        program.run_and_exit(train.run, ['train', *arguments])
    code, message = info.value.args
    assert code == 1 and words in message and '\n' not in message


def test_help():
    done = finish([sys.executable, '-m', 'xmixup_jax.main', '--help'])
    assert '--config.KEY=VALUE' in done.stdout


def test_too_little_device_memory_ends_in_one_line(monkeypatch):
    def fail(message, code):
        raise SystemExit(code, message)

    monkeypatch.setattr(program, 'fail', fail)

    def broken(argv):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory on 9 bytes.\n..')

    with pytest.raises(SystemExit) as info:
        program.run_and_exit(broken, ['main'])
    code, message = info.value.args
    assert code == 1 and 'lower config.batch_size' in message and '\n' not in message


def test_the_log_does_not_import_pytorch():
    """tensorboardX alone would, which takes over a second."""
    code = 'import sys; import xmixup_jax.run.log; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 60))
def test_programs_end_at_multiples_of_their_steps(first, per_dispatch, steps):
    """So a run that goes on from any step tests and saves after the same steps as another one."""

    class Batches:
        def __next__(self):
            return {'label': np.zeros(8, np.int32)}

        def get_state(self):
            return None

    config = ConfigDict({'steps_per_dispatch': per_dispatch})
    stop = loop.AgreedStop(lambda: False)
    ends = [end for end, *_ in loop.prefetch(Batches(), config, first, steps, stop)]
    wanted = [step for step in range(first + 1, steps) if step % per_dispatch == 0]
    assert ends == ([*wanted, steps] if first < steps else [])


def test_the_folder_of_a_pretraining_is_named(config, tmp_path):
    write_json(tmp_path / 'config.json', pretrain_config(config).to_dict())
    with pytest.raises(DataError, match='is the pre-training of other runs'):
        own_run(tmp_path)


def test_constants_of_an_earlier_start_do_not_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    try:
        checkpoints.save_constants({'weights': np.ones(3)})
        digest = checkpoints.save_constants({})
        meta = Meta({}, None, None, Sizes(1), 0.0, [], digest, {})
        assert checkpoints.restore_constants(meta) == {}
    finally:
        checkpoints.close()


def test_the_program_is_named_as_it_can_be_typed(tmp_path, monkeypatch):
    script = tmp_path / '.venv' / 'bin' / 'xmixup'
    script.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, 'executable', str(script.with_name('python')))
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.chdir(tmp_path)
    assert train.program() == 'xmixup'  # not installed as a script
    script.touch(mode=0o755)
    assert train.program() == '.venv/bin/xmixup'
    monkeypatch.setenv('PATH', str(script.parent))
    assert train.program() == 'xmixup'


@pytest.mark.parametrize(('method', 'weight'), [('delta', ' or config.delta.alpha'), ('mars', '')])
def test_a_diverged_run_names_the_weight_of_its_penalty(config, tmp_path, method, weight):
    config.method = method
    checkpoints = Checkpoints(tmp_path, 1)
    try:
        with pytest.raises(UserError, match=f'lower config.optimizer.learning_rate{weight}; to'):
            loop.check_finite(np.array([1.0, np.nan]), 2, config, checkpoints)
    finally:
        checkpoints.close()
