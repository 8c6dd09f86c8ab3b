"""Runs that are killed repeatedly at random moments end like undisturbed runs."""

import json
import os
import signal
import time

import numpy as np
import pytest
from environment import HANGS
from fault_runs import Server, arguments, checkpoints, rows

KILLS = 12
EVERY = 4
VALUES = {
    'steps': 80, 'checkpoint_every': EVERY, 'checkpoint_seconds': 0.0, 'log_every': 2,
    'eval_every': 40, 'keep_checkpoints': 2,
}  # fmt: skip


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def unfinished(workdir):
    """The checkpoints that are being written."""
    return [path for path in (workdir / 'checkpoints').glob('*') if 'tmp' in path.name]


def wait_for_checkpoint(server, workdir):
    """Waits until the next checkpoint is being written, or the run has ended."""
    left = unfinished(workdir)  # from before the last kill
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline and not server.ended(0.002):
        if set(unfinished(workdir)) - set(left):
            return
    assert time.monotonic() < deadline


def parts(workdir):
    """The records of all processes that have worked on the run."""
    path = workdir / 'environment.json'
    return json.loads(path.read_text()) if path.exists() else []


def assert_same(workdir, undisturbed):
    for name in ('model.safetensors', 'best_model.safetensors', 'match.json'):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()
    assert rows(workdir) == rows(undisturbed)
    results = [json.loads((path / 'result.json').read_text()) for path in (workdir, undisturbed)]
    for key in ('top1', 'loss', 'best_step', 'best_top1', 'steps', 'test_images'):
        assert results[0][key] == results[1][key]
    assert not unfinished(workdir)
    assert checkpoints(workdir) == checkpoints(undisturbed)


@pytest.mark.slow
def test_kills_at_random_moments(config, records, tmp_path, server, faults, record_property):
    rng = np.random.default_rng()
    undisturbed, log = tmp_path / 'undisturbed', tmp_path / 'log'
    server.start(arguments(config, undisturbed, **VALUES), log)
    assert server.exit_code() == 0, log.read_text()

    goal = KILLS * faults
    kills, while_writing, runs = 0, 0, 0
    while True:
        workdir = tmp_path / f'run{runs}'
        expected, before = max(checkpoints(workdir), default=0), parts(workdir)
        process = server.start(arguments(config, workdir, **VALUES), log)
        enough = kills >= goal and while_writing >= goal // 6
        if not enough:
            if rng.random() < 0.5 or kills >= goal:
                wait_for_checkpoint(server, workdir)
                if kills < goal:
                    server.ended(rng.uniform(0, 0.2))
            else:
                server.ended(rng.uniform(0, 2))
            if not server.ended(0):
                os.kill(process, signal.SIGKILL)
        code = server.exit_code()
        assert code in (0, -signal.SIGKILL), log.read_text()
        if len(parts(workdir)) > len(before):  # it had begun before it was killed
            assert parts(workdir)[-1]['first_step'] == expected
        if code == 0:
            assert_same(workdir, undisturbed)
            runs += 1
            if enough:
                break
            continue
        kills += 1
        while_writing += bool(unfinished(workdir))
        if (workdir / 'metrics.csv').exists():
            done = max((int(row['step']) for row in rows(workdir)), default=0)
            newest = max(checkpoints(workdir), default=0)
            assert done - newest <= EVERY
    assert 'Traceback' not in log.read_text()
    record_property(
        'kills survived',
        f'{kills} of {goal}, {while_writing} of them while a checkpoint was being written; '
        f'{runs} runs ended as the undisturbed one',
    )
