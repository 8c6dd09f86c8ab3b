"""Comparisons with several runs at a time."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import psutil
import pytest
from environment import HANGS, one_device
from safetensors.numpy import load_file
from test_compare import arguments, read

from xmixup_jax.cli import compare
from xmixup_jax.errors import ConfigError
from xmixup_jax.run import workers

MEASURED = ('seconds', 'first_step_seconds', 'images_per_second')


@pytest.fixture
def start(config, tmp_path):
    """Starts the command on one device and some of this process's cores."""
    started = []

    def popen(*flags, workdir=tmp_path, cores=None):
        usable = sorted(os.sched_getaffinity(0))
        command = [sys.executable, '-m', 'xmixup_jax', *arguments(config, workdir)]
        # Only this process knows the small network of the tests.
        command += ['--config.model.name=resnet10', *flags]
        started.append(
            subprocess.Popen(
                command,
                env=one_device(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, usable[:cores]),
            )
        )
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def finish(process, code=0):
    """Waits for the process, and returns its standard error."""
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == code, errors
    return errors


def wait_until(condition, process):
    deadline = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trains(run):
    """Whether the run has done some steps."""
    path = run / 'metrics.csv'
    return path.exists() and len(path.read_text().splitlines()) > 1


def holder(run):
    """The process that trains the run."""
    return psutil.Process(int(re.findall(r'pid (\d+)', (run / '.lock').read_text())[0]))


def saved_step(run):
    """The step of the newest checkpoint."""
    return max(int(path.name) for path in (run / 'checkpoints').glob('[0-9]*'))


def what_counts(workdir):
    """(rows, weights): the rows without measured times."""
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in read(workdir)]
    weights = {
        str(path.relative_to(workdir)): {k: v.tobytes() for k, v in load_file(path).items()}
        for path in workdir.rglob('model.safetensors')
    }
    return rows, weights


@pytest.mark.slow
def test_two_at_once_make_the_runs_of_one_after_the_other(start, tmp_path):
    flags = ['--methods=finetune,xmixup', '--seeds=0,1', '--config.match.images_per_class=2']
    alone, both = tmp_path / 'alone', tmp_path / 'both'
    # XLA's sums depend on the number of cores, so each run gets one core in both cases.
    finish(start(*flags, workdir=alone, cores=1))
    finish(start(*flags, '--jobs=2', workdir=both, cores=2))
    rows, weights = what_counts(both)
    assert (rows, weights) == what_counts(alone)
    assert [row['method'] for row in rows] == ['finetune', 'xmixup'] * 2 and len(weights) == 4
    for run in (both / 'xmixup' / 'seed0', both / 'finetune' / 'seed1'):
        assert 'decoded images' in (run / workers.LOG).read_text()
    files = [{p.relative_to(d) for g in ('*', '*/*/*') for p in d.glob(g)} for d in (alone, both)]
    assert {path.name for path in files[0] ^ files[1]} == {workers.LOG}
    # The same command finds all runs finished, and further seeds extend the comparison.
    stamps = {path: path.stat().st_mtime_ns for path in both.rglob('result.json')}
    finish(start(*flags, '--seeds=0,1,2', '--jobs=9', workdir=both, cores=2))
    assert len(read(both)) == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.slow
def test_a_diverged_run_does_not_stop_the_others(start, tmp_path):
    flags = ['--methods=l2sp,finetune', '--seeds=0', '--config.l2sp.alpha=4e9', '--config.steps=8']
    errors = finish(start(*flags, '--config.l2sp.beta=4e9', '--jobs=2'), 1)
    assert '1 of 2 runs failed: comparison.csv says why' in errors
    diverged, other = read(tmp_path)
    assert 'the loss is' in diverged['error'] and other['error'] == ''
    assert float(other['top1']) > 0


@pytest.mark.slow
def test_a_mistake_in_a_run_ends_the_comparison_with_its_message(start):
    flags = ['--methods=finetune', '--seeds=0,1', '--jobs=2', '--config.target.shots=500']
    errors = finish(start(*flags), 1).splitlines()
    assert errors[-1].startswith('xmixup: ') and 'shots' in errors[-1]
    assert not any(line.startswith('Traceback') for line in errors)


@pytest.mark.slow
def test_processes_that_are_killed(start, tmp_path):
    flags = ['--methods=finetune', '--seeds=0,1,2', '--config.steps=1000000', '--jobs=2']
    flags += ['--config.log_every=1', '--config.checkpoint_every=1000000']
    runs = [tmp_path / 'finetune' / f'seed{seed}' for seed in (0, 1, 2)]
    parent = start(*flags)
    wait_until(lambda: trains(runs[0]) and trains(runs[1]), parent)
    # If a worker is killed, its run counts as failed, and a new process takes the next one.
    holder(runs[0]).kill()
    wait_until(lambda: trains(runs[2]), parent)
    (row,) = read(tmp_path)
    assert 'killed by SIGKILL' in row['error'] and str(runs[0] / 'log.txt') in row['error']
    # If the parent gets a signal that it can handle, all runs are saved.
    left = [holder(run) for run in runs[1:]]
    before = [saved_step(run) for run in runs[1:]]
    parent.send_signal(signal.SIGTERM)
    assert 'run the same command to resume' in finish(parent, 75)
    assert not any(process.is_running() for process in left)
    after = [saved_step(run) for run in runs[1:]]
    assert all(new > old for new, old in zip(after, before, strict=True))
    # The same with a signal that it cannot handle.
    (runs[0] / 'metrics.csv').unlink()
    before = saved_step(runs[0])
    parent = start(*flags)
    wait_until(lambda: trains(runs[0]), parent)
    left = psutil.Process(parent.pid).children(recursive=True)
    assert len(left) >= 2
    parent.kill()
    finish(parent, -signal.SIGKILL)
    _, alive = psutil.wait_procs(left, timeout=HANGS)
    assert not alive
    assert saved_step(runs[0]) > before


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        ('0', '--jobs=0: must be at least 1'),
        ('-1', '--jobs=-1: must be at least 1'),
        ('x', "argument --jobs: invalid int value: 'x'"),
    ],
)
def test_numbers_of_jobs_that_are_none(config, tmp_path, value, words):
    with pytest.raises(ConfigError, match=f'{words}; see  xmixup compare --help'):
        compare.run(arguments(config, tmp_path, f'--jobs={value}'))


def test_where_jobs_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.delenv('XLA_PYTHON_CLIENT_PREALLOCATE', raising=False)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    with pytest.raises(ConfigError, match='--jobs=2: only one process can use a TPU'):
        compare.run(arguments(config, tmp_path, '--jobs=2'))
    assert os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false'
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    with pytest.raises(ConfigError, match='--jobs=3: a run in several processes uses all'):
        compare.run(arguments(config, tmp_path, '--jobs=3'))


def test_cores_are_divided_evenly(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 2, 4, 6, 8}, raising=False)
    assert workers._divide_cores(2) == [{0, 4, 8}, {2, 6}]
    assert workers._divide_cores(7) == [{0}, {2}, {4}, {6}, {8}, {0}, {2}]
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert workers._divide_cores(2) == [set(), set()]
