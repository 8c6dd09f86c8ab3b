"""Makes all measurements of speed on a GPU, within eight minutes:

    python -m benchmarks.gpu --output=DIR --before=CHECKOUT

Runs the commands below one after the other, each in a process with a time limit, and writes their
tables and output into the folder. The most important ones come first. The last lines compare step
times with the checkout of an earlier version, which is measured on the same card in between.

  --output   folder for the results
  --before   folder with a checkout of the version to compare with (default: none)
  --minutes  time for everything (default: 8)
  --small    use a tiny network and images, to try the script on any machine

Exit code 0: every command succeeded; 1: one failed or ran out of time, and the output says which.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.errors import UserError

RESNET = ('--config=configs/aircraft.py', '--config.batch_size=128')
LITE = (
    *('--config=configs/aircraft.py', '--config.model.name=efficientnet_lite0'),
    *('--config.batch_size=32', '--config.resize=176', '--config.image_size=160'),
)
SMALL = (
    *('--config=configs/digits.py', '--config.model.name=resnet18', '--config.model.width=64'),
    '--config.model.stem=imagenet',
    *('--config.batch_size=8', '--config.resize=20', '--config.image_size=16'),
)
PRECISION = '--config.precision=bfloat16'
STEPS = ('benchmarks.step', '--methods=finetune,xmixup')


class Command(NamedTuple):
    """A benchmark to run."""

    name: str
    """Of its table and log."""
    arguments: tuple[str, ...]
    """Of `python -m`."""
    config: tuple[str, ...]
    """Flags of the experiment; those in `arguments` come after them."""
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed
    before: bool = False
    """Whether it runs in the checkout of the earlier version."""


SHARED = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.45'}  # leaves room for PyTorch
NO_GRAPHS = {'XLA_FLAGS': '--xla_gpu_enable_command_buffer='}  # else kernels cannot be told apart
COMMANDS = (
    Command('step_before', STEPS, RESNET, before=True),
    Command('step', STEPS, RESNET),
    Command('torch_peer', ('benchmarks.torch_peer', '--methods=xmixup'), RESNET, SHARED),
    Command('kernels', ('benchmarks.kernels',), RESNET, NO_GRAPHS),
    Command('lite0_before', STEPS, LITE, before=True),
    Command('lite0', STEPS, LITE),
    Command('attention', ('benchmarks.attention', '--config.model.name=vit_b16'), RESNET),
    Command('input', ('benchmarks.input', '--step', '--images=600'), RESNET),
    Command('checkpoints', ('benchmarks.checkpoints', '--rounds=5'), RESNET),
)


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='gpu')
    parser.add_argument('--output', required=True, type=Path)
    parser.add_argument('--before', type=Path)
    parser.add_argument('--minutes', default=8.0, type=float)
    parser.add_argument('--small', action='store_true')
    args = parser.parse_args(argv[1:])
    args.output.mkdir(parents=True, exist_ok=True)
    output, end = args.output.absolute(), time.monotonic() + 60 * args.minutes
    failed = []
    for command in COMMANDS:
        if command.before and args.before is None:
            continue
        begun = time.monotonic()
        ok = execute(command, output, args.before, args.small, end - begun)
        print(f'{command.name}: {"done" if ok else "FAILED"} in {time.monotonic() - begun:.0f} s')
        failed += [] if ok else [command.name]
    for name in ('step', 'lite0') if args.before else ():  # else the tables are older ones
        for line in ratios(output / f'{name}_before.csv', output / f'{name}.csv'):
            print(f'{name}: {line}')
    if failed:
        raise UserError(f'{", ".join(failed)} failed: see {output}/{failed[0]}.log')


def execute(
    command: Command, output: Path, before: Path | None, small: bool, seconds: float
) -> bool:
    """Runs a command within some seconds, and logs it; returns whether it succeeded."""
    table = output / f'{command.name}.csv'
    table.unlink(missing_ok=True)
    module, *flags = command.arguments
    config = SMALL if small else command.config
    arguments = [sys.executable, '-m', module, f'--output={table}', *config, PRECISION, *flags]
    folder = Path.cwd() if before is None or not command.before else before
    # The checkout comes first on the path, before a version that is installed.
    path = os.pathsep.join([str(folder.absolute()), os.environ.get('PYTHONPATH', '')])
    environment = os.environ | command.environment | {'PYTHONPATH': path.rstrip(os.pathsep)}
    with (output / f'{command.name}.log').open('w') as log:
        try:
            done = subprocess.run(
                arguments,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.write(f'\nran out of time after {seconds:.0f} s\n')
            return False
    return done.returncode == 0 and table.exists()


def ratios(before: Path, after: Path) -> list[str]:
    """Compares the step times in two tables of `benchmarks.step`; [] if one is missing."""
    if not (before.exists() and after.exists()):
        return []
    times = []
    for path in (before, after):
        with path.open(newline='') as file:
            times.append({row['method']: float(row['step ms']) for row in csv.DictReader(file)})
    return [
        f'{method} {old:.2f} ms before, {new:.2f} ms now, {old / new:.3f} times as fast'
        for (method, old), new in zip(times[0].items(), times[1].values(), strict=True)
    ]


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
