"""Runs in several real processes over TCP, as a user would start them by hand."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import portpicker
import pytest
from environment import HANGS, simulated

from xmixup_jax.errors import ConfigError
from xmixup_jax.processes import connect, in_several_processes

STEPS = 32


def start(config, workdir, processes, devices, slurm=False, **values):
    """Starts the processes of one run, each with several simulated devices, joined by flags or with
    the variables of srun."""
    flags = {
        'data_dir': config.data_dir,
        'cache_dir': config.cache_dir,
        'weights': '',
        'model.width': 4,
        'steps': STEPS,
        'optimizer.learning_rate': 0.01,  # so that rounding grows slowly
        'log_every': 1,
        'checkpoint_every': 5,
        'checkpoint_seconds': 0.0,
        'report': False,
    } | values
    command = [
        sys.executable,
        '-m',
        'xmixup_jax.main',
        '--config=configs/digits.py',
        f'--workdir={workdir}',
        *(f'--config.{key}={value}' for key, value in flags.items()),
    ]
    port = portpicker.pick_unused_port()
    started = []
    for i in range(processes):
        flags = [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
        flags = [*flags, f'--process_id={i}'] if processes > 1 and not slurm else []
        environment = {
            'XLA_FLAGS': simulated(devices),
            'JAX_COORDINATOR_PORT': str(port),
        }
        if slurm:
            environment |= {
                'SLURM_JOB_ID': '7',
                'SLURM_STEP_NODELIST': 'localhost',
                'SLURM_STEP_NUM_NODES': '1',
                'SLURM_STEP_NUM_TASKS': str(processes),
                'SLURM_NTASKS': str(processes),
                'SLURM_PROCID': str(i),
                'SLURM_LOCALID': str(i),
            }
        started.append(
            subprocess.Popen(
                [*command, *flags],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def rows(workdir):
    with (workdir / 'metrics.csv').open(newline='') as file:
        return {int(row['step']): float(row['loss']) for row in csv.DictReader(file)}


def reaches(workdir, step, processes):
    deadline = time.monotonic() + HANGS
    while not (workdir / 'metrics.csv').exists() or max(rows(workdir), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(processes, code=0):
    outputs = [process.communicate(timeout=HANGS) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == code, stderr
    return outputs


@pytest.mark.slow
def test_a_run_goes_on_over_any_processes_and_is_the_same(config, records, tmp_path):
    """Stops 1 process, then kills one of 2 processes, then finishes with 2, with a report."""
    alone, moved = tmp_path / 'alone', tmp_path / 'moved'
    reference = start(config, alone, 1, 4)
    finish(reference)

    first = start(config, moved, 1, 4)
    reaches(moved, 6, first)
    first[0].send_signal(signal.SIGTERM)
    finish(first, 75)

    # The images are cached on the devices of both.
    two = start(config, moved, 2, 2, **{'data.cache': 'device'})
    reaches(moved, max(rows(moved)) + 6, two)
    two[1].kill()
    _, stderr = two[0].communicate(timeout=HANGS)
    assert two[0].returncode == 75
    assert stderr.splitlines()[-1].startswith('xmixup: process 1 of the run has died')
    two[1].communicate()
    assert max(rows(moved)) < STEPS

    outputs = finish(start(config, moved, 2, 2, report=True))
    assert '\nxmixup  top1 ' in outputs[0][0] and 'top1' not in outputs[1][0]
    assert 'Class match' in (moved / 'report.html').read_text()
    assert list(rows(alone)) == list(rows(moved)) == list(range(1, STEPS + 1))
    # Sums in another order differ by 1e-6 at first, and by more after many steps.
    losses = np.array([list(rows(folder).values()) for folder in (moved, alone)])
    np.testing.assert_allclose(*losses[:, : STEPS // 2], rtol=1e-5)
    np.testing.assert_allclose(*losses, rtol=5e-4)


@pytest.mark.slow
def test_processes_validate_average_and_stop_as_one_does(config, records, tmp_path):
    values = {
        'steps': 12,
        'target.validation_share': 0.4,
        'eval_every': 4,
        'patience': 2,
        'ema_decay': 0.9,
        'balance.weights': 'inverse',
    }
    results = []
    for processes, devices in ((1, 4), (2, 2)):
        workdir = tmp_path / str(processes)
        finish(start(config, workdir, processes, devices, **values))
        results.append(json.loads((workdir / 'result.json').read_text()))
    one, two = results
    for key in ('steps', 'best_step', 'validation_images', 'test_images'):
        assert one[key] == two[key]
    for key in ('loss', 'ema_loss', 'best_loss'):
        assert one[key] == pytest.approx(two[key], rel=1e-2)


@pytest.mark.slow
def test_processes_save_together_when_one_is_told_to_stop(config, records, tmp_path):
    """A signal to one process is enough. Only the first reports. Joined by SLURM's variables."""
    values = {'method': 'mixup', 'steps': 2000, 'checkpoint_every': 1000, 'log_every': 10}
    two = start(config, tmp_path, 2, 1, slurm=True, **values)
    reaches(tmp_path, 10, two)
    two[1].send_signal(signal.SIGTERM)
    outputs = finish(two, 75)
    saved = max(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert saved == max(rows(tmp_path))
    for _, stderr in outputs:
        assert f'stopped at step {saved} of 2000 by a signal' in stderr
    assert 'uci_digits mixup  step' not in outputs[1][1]


def test_a_mistake_that_one_process_sees_ends_all(config, records, tmp_path):
    two = start(config, tmp_path / 'run', 2, 1, **{'target.split': 'none'})
    outputs = finish(two, 1)
    for _, stderr in outputs:
        assert "uci_digits has no split 'none'" in stderr and 'Traceback' not in stderr


@pytest.mark.parametrize(
    ('environ', 'several'),
    [
        ({}, False),
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, False),  # the batch script itself
        ({'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_STEP_NUM_TASKS': '4'}, True),
        ({'SLURM_STEP_NODELIST': 'n1', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '4'}, False),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ],
)
def test_launchers_are_recognised(environ, several):
    assert in_several_processes(environ) == several


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--num_processes=2'], 'give all of --coordinator'),
        (['--coordinator=a:1', '--process_id=0'], 'give all of --coordinator'),
        (['--coordinator=a:1', '--num_processes=two', '--process_id=0'], 'must be numbers'),
        (['--coordinator=a:1', '--num_processes=2', '--process_id=x'], 'must be numbers'),
        (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], 'must be at least 0'),
    ],
)
def test_impossible_flags(flags, words):
    with pytest.raises(ConfigError, match=words):
        connect(['main', *flags, '--config=x'], {})


def test_one_process_needs_no_flags():
    assert connect(['main', '--config=x'], {}) == ['main', '--config=x']
