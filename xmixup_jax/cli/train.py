r"""Trains a classifier on your images, with help from a source data set, and tests it.

    xmixup train --config=configs/digits.py
    xmixup train --config=configs/digits.py --config.method=finetune --config.seed=1
    xmixup train --config=configs/folder.py --config.target.name=folder:my_photos \
        --config.source.name=folder:imagenet_photos --workdir=runs/mine

  --config=NAME          the experiment: a Python file, or the name of one installed
                         with this package (digits, folder, aircraft, ...)
  --config.KEY=VALUE     changes one of its values, for example --config.batch_size=64;
                         xmixup_jax/defaults.py explains all of them
  --workdir=DIR          the folder of the run (default: runs/EXPERIMENT-METHOD-seedN). The same
                         command continues a run that was stopped, and shows one that is finished
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                         one of several processes, started by hand; SLURM, Open MPI and TPU slices
                         are recognised (--num_processes=auto insists)

The folder gets report.html (what was learnt, in pictures), model.safetensors (the weights),
result.json, metrics.csv, tensorboard/ and checkpoints/.

Exit codes: 0 done; 1 something is missing or broken; 2 an impossible configuration; 75 stopped by
a signal, or by the loss of another process, and saved: run the same command again, or use what is
there with  xmixup finish .

"""

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
    """Prints the result, where it is, and what to do with it; in the first process."""
    if not is_first():
        return
    print(f'{summary(result)}  ->  {one_line(workdir)}')
    written = {'report': REPORT, 'weights': WEIGHTS_FILE, 'rows': METRICS}
    for name, file in written.items():
        if (workdir / file).exists():
            print(f'  {name:8} {one_line(workdir / file)}')
    if not (workdir / REPORT).exists():
        print(f'  report   {shell_line(["xmixup", "report", f"--workdir={workdir}"])}')
    print(f'  predict  {shell_line(["xmixup", "predict", f"--workdir={workdir}"])} IMAGE ...')


def summary(result: dict[str, Any]) -> str:
    """The content of result.json in a line."""
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
