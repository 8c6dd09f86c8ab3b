r"""Trains a classifier on your images, with help from a source data set, and tests it.

    xmixup train --config=configs/digits.py
    xmixup train --config=configs/digits.py --config.method=finetune --config.seed=1
    xmixup train --config=configs/folder.py --config.target.name=folder:my_photos \
        --config.source.name=folder:imagenet_photos --workdir=runs/mine

  --config=FILE          the experiment, a Python file; those in configs/ are examples
  --config.KEY=VALUE     changes one of its values, for example --config.batch_size=64;
                         configs/default.py explains all of them
  --workdir=DIR          the folder of the run (default: runs/EXPERIMENT-METHOD-seedN). The same
                         command continues a run that was stopped, and shows one that is finished
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                         one of several processes, started by hand; SLURM, Open MPI and TPU slices
                         are recognised (--num_processes=auto insists)

The folder gets report.html (what was learnt, in pictures), model.safetensors (the weights),
result.json, metrics.csv, tensorboard/ and checkpoints/.

Exit codes: 0 done; 1 something is missing or broken; 2 an impossible configuration; 75 stopped by
a signal, or by the loss of another process, and saved: run the same command again.

(`python -m xmixup_jax.main` is the same as `xmixup train`.)
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging as absl_logging
from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.errors import Interrupted, UserError, first_line
from xmixup_jax.loop import interrupt
from xmixup_jax.models.find_weights import WEIGHTS_FILE
from xmixup_jax.processes import ProcessLost, connect, is_first, leave
from xmixup_jax.train import train_and_evaluate
from xmixup_jax.workdir import METRICS, REPORT


def read_command(argv: list[str]) -> tuple[ConfigDict, Path]:
    """The configuration, checked and put into effect, and the work directory."""
    config, workdir = config_lib.parse_flags(connect(argv))
    config_lib.validate(config, jax.device_count())
    setup(config)
    return config, workdir


def setup(config: ConfigDict) -> None:
    """Process-wide settings: log level and the persistent compilation cache."""
    # orbax and tfds narrate every file, and log with a stack trace what they raise as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # and this every retry
    logging.basicConfig(format='%(message)s', force=True)
    logging.getLogger('xmixup_jax').setLevel(logging.INFO if is_first() else logging.WARNING)
    jax.config.update('jax_compilation_cache_dir', str(Path(config.cache_dir).expanduser() / 'xla'))
    # Small programs as well: there are many before the first step.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(args) -> None:
    """As Python does it; but a read that orbax has given up leaves others behind that find no
    loop any more."""
    if 'Event loop is closed' not in str(args.exc_value):
        sys.__unraisablehook__(args)


def run(argv: list[str]) -> None:
    """Trains and prints the result line."""
    config, workdir = read_command(argv)
    result = train_and_evaluate(config, workdir)
    if not is_first():
        return
    print(
        f'{result["method"]}  top1 {100 * result["top1"]:.2f} %  on {result["test_images"]} images '
        f'({result["steps"]} steps, {result["seconds"]:.1f} s, '
        f'{result["images_per_second"]} images/s)  ->  {workdir}'
    )
    written = {'report': REPORT, 'weights': WEIGHTS_FILE, 'rows': METRICS}
    for name, file in written.items():
        if (workdir / file).exists():
            print(f'  {name:8} {workdir / file}')
    print(f'  predict  python -m xmixup_jax.predict --workdir={workdir} IMAGE ...')


def main() -> None:
    ended(run, sys.argv)


def ended(program: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs a program, or prints its module's text for --help; a user's mistake, or a signal, ends
    the process with one line and the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the training loop has its own, and saves first
        signal.signal(number, interrupt)
    try:
        if {'-h', '--help', '-help'} & set(argv):
            print(sys.modules[program.__module__].__doc__)
        else:
            program(argv)
            sys.stdout.flush()
    except UserError as error:
        if isinstance(error, Interrupted):
            leave()  # all processes have agreed to stop, and some may still be writing
        fail(str(error), error.exit_code)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' in str(error):
            fail(
                f'the devices have too little memory ({first_line(error)}): lower config.batch_size'
                ', or take config.accumulate_steps, config.remat or config.precision=bfloat16',
                UserError.exit_code,
            )
        if jax.process_count() == 1:
            raise
        fail(
            f'another process of the run has ended or cannot be reached ({first_line(error)}): '
            'start all of them again; they continue from the newest checkpoint',
            ProcessLost.exit_code,
        )
    except KeyboardInterrupt:
        fail('stopped by a signal: the same command continues', Interrupted.exit_code)
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os._exit(1)
    except OSError as error:  # a full disk, a read-only folder
        if error.strerror is None:
            raise
        where = f' {error.filename}' if error.filename else ''
        fail(
            f'cannot read or write{where}: {error.strerror}; mend that (room, permissions) and run '
            'the same command again: it continues',
            UserError.exit_code,
        )


def fail(message: str, exit_code: int) -> None:
    """Ends the process with one message; threads that still read images are not waited for."""
    sys.stdout.flush()
    print(f'xmixup: {message}', file=sys.stderr, flush=True)
    os._exit(exit_code)


if __name__ == '__main__':
    main()
