"""Full and read-only disks, vanishing files, two runs in one folder, and signals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from environment import HANGS
from fault_runs import ENVIRONMENT, Server, arguments, checkpoints, rows
from safetensors.numpy import load_file

from xmixup_jax import files
from xmixup_jax.cli.export import export
from xmixup_jax.data.selection import Data
from xmixup_jax.predictor import load
from xmixup_jax.run.train import train_and_evaluate

VALUES = {'steps': 40, 'checkpoint_every': 4, 'log_every': 2, 'method': 'finetune'}
VALUES |= {'checkpoint_seconds': 0.0}


@pytest.fixture(scope='module')
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def undisturbed(config, records, server, tmp_path):
    workdir = tmp_path / 'undisturbed'
    server.start(arguments(config, workdir, **VALUES), tmp_path / 'log')
    assert server.exit_code() == 0
    return workdir


def assert_same(workdir, undisturbed):
    name = 'model.safetensors'
    assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()
    assert rows(workdir) == rows(undisturbed)


def one_line(text):
    """The last line of the output, which must be the error; no stack trace."""
    assert 'Traceback' not in text
    line = text.splitlines()[-1]
    assert line.startswith('xmixup: '), text
    return line


def in_a_small_file_system(script, **variables):
    """Runs a shell script with $DIR on a file system of 3 MB, if the machine allows mounting."""
    mounted = 'mount -t tmpfs -o size=3m none "$DIR" && exec bash -euo pipefail -c "$SCRIPT"'
    command = ['unshare', '--map-root-user', '--mount', 'bash', '-c', mounted]
    return subprocess.run(
        command,
        env=ENVIRONMENT | {'SCRIPT': script} | variables,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


@pytest.mark.slow
def test_full_and_read_only_disks(config, undisturbed, server, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    probe = in_a_small_file_system('true', DIR=str(disk))
    if probe.returncode:
        pytest.skip(f'no file system can be mounted here: {probe.stderr.strip()}')
    args = arguments(config, disk / 'run', **VALUES)
    script = """
        code=0; "${RUN[@]}" || code=$?; echo "code $code"
        ls "$DIR/run/checkpoints"
        mount -o remount,ro "$DIR"
        code=0; "${RUN[@]}" || code=$?; echo "code $code"
        cp -r "$DIR/run" "$OUT"
    """
    words = ' '.join(f"'{word}'" for word in [sys.executable, '-m', 'xmixup_jax.main', *args])
    # Room for some checkpoints, then none.
    script = f'RUN=({words})\nhead -c 2300000 /dev/zero > "$DIR/ballast"\n{script}'
    done = in_a_small_file_system(script, DIR=str(disk), OUT=str(tmp_path / 'out'))
    assert 'Traceback' not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('code')]
    assert lines == ['code 1', 'code 1'], done.stderr
    full, read_only = [x for x in done.stderr.splitlines() if x.startswith('xmixup: ')]
    assert 'free disk space' in full and 'No space left on device' in full
    assert f'cannot write into {disk}/run: Read-only file system' in read_only
    # On another disk with space, the same run resumes.
    server.start(arguments(config, tmp_path / 'out', **VALUES), tmp_path / 'log')
    assert server.exit_code() == 0
    assert_same(tmp_path / 'out', undisturbed)


@pytest.mark.slow
def test_a_file_that_cannot_grow(config, records, tmp_path):
    """Imitates a full disk without mounting one: files are limited to 40 kB."""
    workdir = tmp_path / 'run'
    args = [sys.executable, '-m', 'xmixup_jax.main', *arguments(config, workdir, **VALUES)]
    done = subprocess.run(
        args,
        env=ENVIRONMENT | {'JAX_ENABLE_COMPILATION_CACHE': 'false'},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 1, done.stderr
    assert 'File too large' in one_line(done.stderr)


@pytest.mark.slow
def test_a_second_run_and_a_folder_that_is_taken_away(config, records, server, tmp_path):
    workdir, log = tmp_path / 'run', tmp_path / 'log'
    args = arguments(config, workdir, **VALUES | {'steps': 4000})
    process = server.start(args, log)
    while len(checkpoints(workdir)) < 2:
        assert not server.ended(0.01), log.read_text()
    second = subprocess.run(
        [sys.executable, '-m', 'xmixup_jax.main', *args],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert second.returncode == 1
    assert f'(host {os.uname().nodename}, pid {process})' in one_line(second.stderr)

    shutil.move(workdir / 'checkpoints', tmp_path / 'elsewhere')
    (workdir / 'checkpoints').write_text('a file')
    assert server.exit_code() == 1
    assert 'cannot be written into' in one_line(log.read_text())
    (workdir / 'checkpoints').unlink()
    shutil.move(tmp_path / 'elsewhere', workdir / 'checkpoints')
    # Without config.json, the checkpoints have the run's configuration.
    (workdir / 'config.json').unlink()
    server.start(arguments(config, workdir, **VALUES), log)
    assert server.exit_code() == 2
    assert '(config.steps: 4000 -> 40)' in one_line(log.read_text())


def test_signals_before_the_first_step(config, records, server, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        workdir, log = tmp_path / number.name, tmp_path / f'log {number.name}'
        many = VALUES | {'steps': 4000}  # so that it does not end before the signal
        process = server.start(arguments(config, workdir, **many), log)
        while not (workdir / '.lock').exists():
            assert not server.ended(0.005)
        os.kill(process, number)
        assert server.exit_code() == 75
        assert one_line(log.read_text()).endswith('run the same command to resume')


def test_power_may_fail_at_any_time(config, tmp_path, monkeypatch):
    """A checkpoint is completely on disk before an older one is deleted."""
    synced, deletions = set(), []
    sync = files.sync

    def noted(path):
        sync(path)
        synced.add(path.stat().st_ino)

    def delete(manager, step, original=ocp.CheckpointManager.delete):
        newest = max(checkpoints(tmp_path))
        folder = tmp_path / 'checkpoints' / str(newest)
        for path in (folder.parent, folder, *folder.rglob('*')):
            assert path.stat().st_ino in synced, path
        deletions.append((step, newest))
        original(manager, step)

    monkeypatch.setattr(files, 'sync', noted)
    monkeypatch.setattr(ocp.CheckpointManager, 'delete', delete)
    config.update({'method': 'finetune', 'checkpoint_every': 2, 'keep_checkpoints': 1})
    train_and_evaluate(config, tmp_path)
    assert deletions == [(0, 2), (2, 4), (4, 6)]


def test_what_is_stored_with_a_run(config, tmp_path):
    config.method = 'finetune'
    result = train_and_evaluate(config, tmp_path)
    (part,) = json.loads((tmp_path / 'environment.json').read_text())
    assert (
        part['first_step'] == 0
        and part['device_kind'] == 'cpu'
        and part['devices'] == jax.device_count()
    )
    assert part['versions']['jax'] and part['variables']['JAX_PLATFORMS'] == 'cpu'
    git = partial(subprocess.run, capture_output=True, text=True)
    tracked = git(['git', 'ls-files', '--error-unmatch', 'xmixup_jax/run/provenance.py'])
    if tracked.returncode == 0:  # not in a copy without its history
        commit = git(['git', 'rev-parse', 'HEAD']).stdout.strip()
        assert part['commit'].removesuffix('-dirty') == commit
    assert result['commit'] == part['commit']
    began = time.strptime(part['started'][:19], '%Y-%m-%dT%H:%M:%S')
    assert abs(time.mktime(began) - time.mktime(time.gmtime())) < 600
    sums = subprocess.run(
        ['sha256sum', '--check', 'SHA256SUMS'], cwd=tmp_path, capture_output=True, text=True
    )
    assert sums.returncode == 0 and 'result.json: OK' in sums.stdout


def test_one_seed_gives_the_same_bits(config, tmp_path):
    """The result does not depend on the number of threads, the cache or the times of tests."""
    finals = []
    for i, (threads, cache, every) in enumerate([(1, 'none', 0), (3, 'memory', 2)]):
        config.update({'num_threads': threads, 'eval_every': every})
        config.data.cache = cache
        train_and_evaluate(config, tmp_path / str(i))
        finals.append(load_file(tmp_path / str(i) / 'model.safetensors'))
    assert finals[0].keys() == finals[1].keys()
    for key, tensor in finals[0].items():
        np.testing.assert_array_equal(tensor, finals[1][key])


def test_names_of_classes_are_no_paths(config, records, tmp_path):
    names = ('../../out', '/out', '<script>', 'a\nb', '-rf', '~', '..', '%2e', '"', '$HOME')
    target, test, source = (replace(part, class_names=names) for part in records)
    workdir = tmp_path / 'deep' / 'run'
    before = set(tmp_path.rglob('*'))
    train_and_evaluate(config, workdir, Data(target, test, source))
    export(load(workdir), 'safetensors', workdir / 'export' / 'model.safetensors')
    made = set(tmp_path.rglob('*')) - before - {workdir.parent, workdir}
    assert made and all(path.is_relative_to(workdir) for path in made)
    assert not any(set(path.parts) & set(names) for path in made)
    match = json.loads((workdir / 'match.json').read_text())
    assert tuple(row['target'] for row in match) == names
