"""XMixup: train an image classifier on few images, with help from a large labelled data set.

    xmixup train --config=configs/digits.py        train and test a network; writes a report
    xmixup match --config=configs/digits.py        show which source classes help which class
    xmixup compare --config=configs/digits.py --methods=xmixup,finetune --workdir=runs/compare
                                                   compare methods over several seeds
    xmixup compare RUN_A RUN_B                     show where two finished runs differ
    xmixup predict --workdir=RUN photo.jpg dir/    predict the classes of images
    xmixup evaluate --workdir=RUN --data=folder:DIR
                                                   test a trained network on other images
    xmixup finish --workdir=RUN                    test a run that was stopped early
    xmixup report --workdir=RUN                    write report.html of a finished run
    xmixup export --workdir=RUN --format=torch     convert the weights for other programs
    xmixup prepare --config=configs/cub.py         download and convert the data in advance

RUN is the folder of a run. `xmixup COMMAND --help` explains a command and its flags; `xmixup
--version` prints the version.

The first command needs no download: it trains on digits that ship inside Python packages.
Documentation: README.md and docs/.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from xmixup_jax.errors import ConfigError, Interrupted, ProcessLost, UserError, first_line
from xmixup_jax.run.signals import interrupt

COMMANDS = (
    *('train', 'match', 'compare', 'predict', 'evaluate', 'finish', 'report', 'export'),
    'prepare',
)
HELP = {'-h', '--help', '-help', 'help'}
STOPPED = 'stopped by a signal: run the same command to resume'
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_YNNPACK = '--xla_cpu_experimental_ynn_fusion_type'
_HUGE_PAGES = 'glibc.malloc.hugetlb'
_SYSTEM_SETTING = Path('/sys/kernel/mm/transparent_hugepage/enabled')


class Parser(argparse.ArgumentParser):
    """Parses the flags of a command. Raises ConfigError on mistakes; `run_and_exit` prints help."""

    def __init__(self, command: str):
        super().__init__(prog=f'xmixup {command}', add_help=False, allow_abbrev=False)

    def parse_args(self, args, namespace=None):  # type: ignore[override]
        """Like argparse's, but reports an unknown flag before a missing one."""
        known = self._option_string_actions
        for argument in itertools.takewhile(lambda each: each != '--', args):
            flag = argument.partition('=')[0]
            if flag.startswith('--') and flag not in known:
                close = difflib.get_close_matches(flag, known, 1)
                self.error(
                    f'there is no flag {flag}{f", did you mean {close[0]}?" if close else ""}'
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message}; see  {self.prog} --help')


def main(arguments: list[str] | None = None) -> None:
    """Runs the console command `xmixup`.

    Args:
      arguments: name of the command and its flags; by default those of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ['--help']
    if HELP & {name, *rest}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped to `head`
    if name in HELP:
        print(__doc__)
    elif name == '--version':
        print(importlib.import_module('xmixup_jax').__version__)
    elif name not in COMMANDS:
        print(
            f'xmixup: there is no command {name!r}: use {", ".join(COMMANDS)}; see  xmixup --help',
            file=sys.stderr,
        )
        sys.exit(2)
    elif HELP & set(rest):
        print(help_text(module_of(name)))
    else:
        if arguments is None:
            use_huge_pages()
        run_and_exit(_imported(module_of(name)), [f'xmixup {name}', *rest])


def _imported(module: str) -> Callable[[list[str]], None]:
    """Returns a function that imports a command's module and calls its `run`."""

    def program(argv: list[str]) -> None:
        for number in _SIGNALS:
            signal.signal(number, stop_at_once)
        command = importlib.import_module(module)
        for number in _SIGNALS:
            signal.signal(number, interrupt)
        command.run(argv)

    return program


def stop_at_once(number: int, frame) -> NoReturn:
    """Signal handler during imports: ends the process, which has nothing to save.

    It does not raise, because an importing library could swallow the exception or turn it into
    another one.
    """
    del number, frame
    os.write(2, f'xmixup: {STOPPED}\n'.encode())
    os._exit(Interrupted.exit_code)


def module_of(command: str) -> str:
    """Returns the name of the module with a command's help (its docstring) and its `run`."""
    return f'{__package__}.{command}'


def help_text(module: str) -> str:
    """Returns a module's docstring without importing it: JAX alone would take seconds."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None  # a file of this package
    source = Path(spec.origin).read_text(encoding='utf-8')
    return ast.get_docstring(ast.parse(source)) or ''


def run_and_exit(program: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs a program, and ends the process on errors.

    A user's mistake or a signal ends it with one line on standard error and an exit code. `--help`
    prints the docstring of the program's module.

    Args:
      program: called with `argv`.
      argv: name of the program and its arguments.
    """
    for number in _SIGNALS:  # the training loop installs its own handlers, which save first
        signal.signal(number, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be invalid text
        sys.stdout.reconfigure(errors='backslashreplace')
    use_eigen()
    try:
        if HELP & set(argv):
            print(sys.modules[program.__module__].__doc__)
        else:
            program(argv)
            sys.stdout.flush()
    except UserError as error:
        if isinstance(error, Interrupted):
            # All processes stop at the same step, but some may still be writing.
            importlib.import_module('xmixup_jax.processes').leave()
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(STOPPED, Interrupted.exit_code)
    except BrokenPipeError:  # the reader of the output, for example `head`, has exited
        os._exit(1)
    except OSError as error:  # a full disk, a read-only folder
        if error.strerror is None:
            raise
        where = f' {error.filename}' if error.filename else ''
        fail(
            f'cannot read or write{where}: {error.strerror}; check disk space and permissions, '
            'then run the same command to resume',
            UserError.exit_code,
        )
    except Exception as error:
        _fail_on_device_error(error)
        raise


def use_huge_pages() -> None:
    """Starts the process again with huge pages for its memory, if the system gives them on request.

    XLA allocates the memory of a step anew each time. With pages of 4 KB, a step on a CPU takes up
    to 1.6 times as long (benchmarks/RESULTS.md, "Huge pages"). glibc 2.35 and later ask for huge
    pages if GLIBC_TUNABLES says so when the process starts.

    Does nothing if GLIBC_TUNABLES has the setting already, or if a debugger traces the process.
    Call it early: everything done before is done again.
    """
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    try:
        library, version = (os.confstr('CS_GNU_LIBC_VERSION') or '').split()
        on_request = '[madvise]' in _SYSTEM_SETTING.read_text()
    except (AttributeError, OSError, ValueError):  # not Linux, not glibc, no access to /sys
        return
    known = library == 'glibc' and tuple(map(int, version.split('.')[:2])) >= (2, 35)
    if not (known and on_request) or _HUGE_PAGES in tunables or sys.gettrace() is not None:
        return
    os.environ['GLIBC_TUNABLES'] = f'{tunables}:{_HUGE_PAGES}=1'.strip(':')
    with contextlib.suppress(OSError):  # without them the program works, too
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # the same


def use_eigen() -> None:
    """Makes XLA compute convolutions on CPUs with Eigen instead of YNNPACK.

    YNNPACK computes a convolution to 64 channels in a single thread, and the gradient by a
    kernel takes up to four times as long (benchmarks/RESULTS.md, "Convolutions on a CPU"). Has an
    effect on this process, if JAX has not computed anything yet, and on those that it starts.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    # XLA ends the process if it does not know a flag.
    known = importlib.metadata.version('jaxlib').startswith(('0.10.', '0.11.', '0.12.'))
    if known and _YNNPACK not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {_YNNPACK}=-individual_convolution'.strip()


def _fail_on_device_error(error: Exception) -> None:
    """Ends the process if the error means that there is no device, that the devices ran out of
    memory, or that another process was lost."""
    jax = sys.modules.get('jax')
    if jax is None or not isinstance(error, (RuntimeError, AssertionError)):
        return
    _fail_without_devices(jax)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return
    if 'RESOURCE_EXHAUSTED' in str(error):
        fail(
            f'the devices ran out of memory ({first_line(error)}): lower config.batch_size'
            ', or use config.accumulate_steps, config.remat or config.precision=bfloat16',
            UserError.exit_code,
        )
    if jax.process_count() > 1:
        fail(
            f'another process of the run has ended or cannot be reached ({first_line(error)}): '
            'start all of them again; they resume from the newest checkpoint',
            ProcessLost.exit_code,
        )


def _fail_without_devices(jax) -> None:
    """Ends the process if JAX finds no device of the requested platform."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: cuda, with JAX 0.10
        names = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME')
        name = next((each for each in names if os.environ.get(each)), names[0])
        reason = first_line(error).partition(" (set JAX_PLATFORMS=''")[0]
        why = '' if isinstance(error, AssertionError) else f' ({reason})'
        fail(
            f'{name}={os.environ.get(name, "")}: JAX finds no such device{why}; unset {name} or '
            "set it to cpu, or install JAX for the device: pip install 'jax[cuda12]' or 'jax[tpu]'",
            UserError.exit_code,
        )


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints one line on standard error and ends the process at once.

    It does not wait for threads that are still reading images.
    """
    sys.stdout.flush()
    print(f'xmixup: {message}', file=sys.stderr, flush=True)
    os._exit(exit_code)


def setup(cache_dir: str) -> None:
    """Sets up logging and the persistent compilation cache of this process.

    Args:
      cache_dir: config.cache_dir; the compilation cache is in its folder xla.
    """
    import jax
    from absl import logging as absl_logging

    # Orbax and tfds log every file they touch, and a stack trace for every error they raise.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it logs every retry
    logging.basicConfig(format='%(message)s', force=True)
    level = logging.INFO if jax.process_index() == 0 else logging.WARNING
    logging.getLogger('xmixup_jax').setLevel(level)
    jax.config.update('jax_compilation_cache_dir', str(Path(cache_dir).expanduser() / 'xla'))
    # Cache small programs too: there are many before the first step.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(args) -> None:
    """Like Python's own hook, but silent about reads that Orbax abandoned with their event loop."""
    if 'Event loop is closed' not in str(args.exc_value):
        sys.__unraisablehook__(args)
