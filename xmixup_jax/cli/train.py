r"""Trains an image classifier on your images, with help from a source data set, and tests it.

    xmixup train --config=configs/digits.py
    xmixup train --config=configs/digits.py --config.method=finetune --config.seed=1
    xmixup train --config=configs/folder.py --config.target.name=folder:my_photos \
        --config.source.name=folder:imagenet_photos --workdir=runs/mine

  --config=NAME          the experiment (required): a Python file, or the name of an experiment
                         that ships with this package (digits, folder, aircraft, ...)
  --config.KEY=VALUE     overrides a value of the experiment, for example --config.batch_size=64;
                         xmixup_jax/defaults.py explains all values
  --workdir=DIR          the folder of the run (default: runs/EXPERIMENT-METHOD-seedN)
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                         only for a run in several processes that you start by hand. SLURM, Open
                         MPI and TPU slices are detected; --num_processes=auto fails if they are not

The folder of the run gets report.html (the results in pictures), model.safetensors (the weights),
result.json (accuracy and speed), metrics.csv and tensorboard/ (curves during training), and
checkpoints/. If the run is stopped, the same command resumes it from its newest checkpoint; if it
is finished, the same command shows its result.

Exit codes: 0 success; 1 something is missing or broken; 2 invalid configuration; 75 stopped by a
signal, or because another process was lost. In the last case the run is saved: run the same command
to resume it, or  xmixup finish  to test the network as it is.

"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from xmixup_jax.cli.flags import read_command
from xmixup_jax.files import METRICS, REPORT
from xmixup_jax.processes import is_first
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.text import one_line, shell_line
from xmixup_jax.weights.find import WEIGHTS_FILE


def run(argv: list[str]) -> None:
    """Trains and prints the result."""
    config, workdir = read_command(argv)
    print_result(train_and_evaluate(config, workdir), workdir)


def print_result(result: dict[str, Any], workdir: Path) -> None:
    """Prints the result, its files, and what to do next; only in the first process."""
    if not is_first():
        return
    print(f'{summary(result)}  ->  {one_line(workdir)}')
    written = {'report': REPORT, 'weights': WEIGHTS_FILE, 'metrics': METRICS}
    for name, file in written.items():
        if (workdir / file).exists():
            print(f'  {name:8} {one_line(workdir / file)}')
    if not (workdir / REPORT).exists():
        print(f'  report   {shell_line([program(), "report", f"--workdir={workdir}"])}')
    print(f'  predict  {shell_line([program(), "predict", f"--workdir={workdir}"])} IMAGE ...')


def program() -> str:
    """What to type for `xmixup`: the path of the script if its environment is not activated."""
    script = Path(sys.executable).with_name('xmixup')
    if shutil.which('xmixup') or not script.exists():
        return 'xmixup'
    return min(str(script), os.path.relpath(script), key=len)


def summary(result: dict[str, Any]) -> str:
    """Returns the main content of result.json in one line."""
    of = f' of {result["stopped_of"]}' if 'stopped_of' in result else ''
    done = [
        f'{result["steps"]}{of} step{"" if result["steps"] == 1 else "s"}',
        f'{result["seconds"]:.1f} s',
    ]
    if result['images_per_second'] is not None:  # a single step is compilation
        done.append(f'{result["images_per_second"]} images/s')
    tested = ''
    if 'top1' in result:
        tested = f'  top1 {100 * result["top1"]:.2f} %  on {result["test_images"]} images'
    return f'{result["method"]}{tested} ({", ".join(done)})'
