"""Measures memory, open files and threads of a long run:

    python -m benchmarks.soak --minutes=31 --config=configs/digits.py --config.eval_every=2000

Starts an endless run as a user would, samples its process every ten seconds, and stops it with
SIGTERM. Range and slope leave out the first half of the time, in which the run compiles and its
caches and the allocator's arenas fill.

  --minutes      duration (default: 35)
  --workdir=DIR  folder of the run (default: a temporary folder)
  --output       CSV file of all samples to write
  --config...    as for `xmixup train`
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.synthetic import write_table
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.errors import Interrupted, UserError
from xmixup_jax.files import METRICS

_SECONDS = 10


def sample(process: psutil.Process, workdir: Path, begun: float) -> dict[str, float]:
    with process.oneshot():
        row = {
            'minutes': (time.monotonic() - begun) / 60,
            'rss MB': process.memory_info().rss / 2**20,
            'open files': process.num_fds(),
            'threads': process.num_threads(),
        }
    lines = (workdir / METRICS).read_text().splitlines() if (workdir / METRICS).exists() else ['']
    step = lines[-1].split(',')[0]
    return row | {'step': int(step) if step.isdigit() else 0}


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='soak', add_help=False)  # `run_and_exit` prints help
    parser.add_argument('--minutes', type=float, default=35.0)
    parser.add_argument('--workdir', type=Path)
    parser.add_argument('--output', type=Path)
    args, config_args = parser.parse_known_args(argv[1:])
    workdir = args.workdir or Path(tempfile.mkdtemp(), 'run')
    command = [sys.executable, '-m', 'xmixup_jax.main', *config_args, '--config.steps=100000000']
    begun = time.monotonic()
    process = psutil.Popen([*command, f'--workdir={workdir}'], stderr=subprocess.DEVNULL)
    rows = []
    while time.monotonic() - begun < 60 * args.minutes:
        time.sleep(_SECONDS)
        if process.poll() is not None:
            raise UserError(f'the run ended with exit code {process.returncode}')
        rows.append(sample(process, workdir, begun))
    process.send_signal(signal.SIGTERM)
    code = process.wait(120)
    if code != Interrupted.exit_code:
        raise UserError(f'after SIGTERM, the run ended with exit code {code}')
    write_table(rows, args.output)
    settled = rows[len(rows) // 2 :]
    minutes, rss = (np.array([row[key] for row in settled]) for key in ('minutes', 'rss MB'))
    slope = np.polyfit(minutes, rss, 1)[0]
    print(
        f'{rows[-1]["minutes"]:.1f} minutes, {rows[-1]["step"]} steps: '
        f'{rss.min():.0f} to {rss.max():.0f} MB, slope {60 * slope:+.1f} MB per hour; '
        f'{settled[0]["open files"]} to {rows[-1]["open files"]} open files, '
        f'{settled[0]["threads"]} to {rows[-1]["threads"]} threads'
    )


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
