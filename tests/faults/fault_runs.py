"""Starts real runs for tests that disturb them."""

import csv
import json
import select
import subprocess
import sys
from pathlib import Path

from environment import HANGS, one_device

ENVIRONMENT = one_device() | {'OPENBLAS_NUM_THREADS': '1'}


def arguments(config, workdir, **values):
    flags = {
        'data_dir': config.data_dir,
        'cache_dir': config.cache_dir,
        'weights': '',
        'model.width': 4,
        'eval_batch_size': 1024,
        'report': False,
    } | values
    return [
        '--config=configs/digits.py',
        f'--workdir={workdir}',
        *(f'--config.{key}={value}' for key, value in flags.items()),
    ]


class Server:
    """Starts one run at a time, see server.py."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.faults.server'],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, args, log: Path) -> int:
        """Starts a run; returns its process id."""
        self._process.stdin.write(json.dumps([*args, str(log)]) + '\n')
        return int(self._process.stdout.readline())

    def ended(self, seconds: float) -> bool:
        """Waits until the run has ended, at most this long; returns whether it has."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def exit_code(self, seconds: float = HANGS) -> int:
        assert self.ended(seconds), 'the run hangs'
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(HANGS)
        self._process.stdout.close()


def rows(workdir):
    """The rows of metrics.csv, without measured times."""
    with (workdir / 'metrics.csv').open(newline='') as file:
        return [row | {'images_per_second': ''} for row in csv.DictReader(file)]


def checkpoints(workdir):
    """The steps of complete checkpoints, ascending."""
    folder = workdir / 'checkpoints'
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())
