"""Executes several runs at once, in worker processes that each make one run at a time."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import jax
from tqdm import tqdm

from xmixup_jax.data.selection import Opened
from xmixup_jax.errors import ConfigError, Interrupted, UserError, first_line
from xmixup_jax.run.grid import Row, Run, row_of
from xmixup_jax.run.signals import interrupt
from xmixup_jax.run.workdir import has_result

log = logging.getLogger('xmixup_jax')

LOG = 'log.txt'
"""File in the folder of a run that gets the output of its process."""
# A worker whose parent was killed saves and exits; after this time it exits in any case.
_GRACE_SECONDS = 60
_SHARED_MEMORY = 0.9  # share of a GPU's memory for all workers together


def disable_preallocation() -> None:
    """Keeps this process and its workers from preallocating a GPU's whole memory.

    Call it before JAX is used.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')


def check_jobs(jobs: int) -> None:
    """Raises ConfigError if the devices cannot be used by several processes."""
    if jobs > 1 and jax.process_count() > 1:
        raise ConfigError(
            f'--jobs={jobs}: a run in several processes uses all devices: leave out --jobs'
        )
    if jobs > 1 and jax.default_backend() == 'tpu':
        raise ConfigError(f'--jobs={jobs}: only one process can use a TPU: leave out --jobs')


def rows_in_parallel(
    runs: list[Run], title: str, jobs: int, prepare: Callable[[], None]
) -> Iterator[tuple[int, Row]]:
    """Yields (index of the run, its `row_of`) as runs finish.

    A run whose process dies yields a row with an 'error'; the others go on. If this generator or
    its process ends early, the runs save and stop.

    Args:
      runs: the runs; their folders get `LOG`.
      title: title of the progress bar.
      jobs: number of processes. On CPUs they divide the cores.
      prepare: called in each process before its first run; must be picklable.

    Raises:
      UserError: a run raised it.
    """
    opened: Opened = {}
    finished = [has_result(run.workdir) for run in runs]
    with tqdm(total=len(runs), desc=title, unit='run', disable=None) as bar:
        for number, run in enumerate(runs):
            if finished[number]:
                yield number, row_of(run, opened)
                bar.update()
        left = deque(number for number, run in enumerate(runs) if not finished[number])
        with _workers(min(jobs, len(left)), prepare) as workers:
            while left or any(worker.run for worker in workers):
                for worker in workers:
                    if left and worker.run is None:
                        worker.begin(left[0], runs[left.popleft()])
                ready = wait([worker.connection for worker in workers if worker.run])
                for worker in workers:
                    if worker.connection in ready:
                        yield worker.end()
                        bar.update()


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, cores: set[int], prepare: Callable[[], None]):
        self.run: Run | None = None
        """The run in progress; None if idle."""
        self._number = 0
        self._cores = cores
        self._prepare = prepare
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self._prepare), daemon=True)
        with _on_cores(self._cores):  # inherited by all of its threads
            self.process.start()
        other.close()  # otherwise `recv` would not notice that the worker has died

    def begin(self, number: int, run: Run) -> None:
        """Sends a run to the worker; starts a new process if the old one has died."""
        if not self.process.is_alive():
            self.connection.close()
            self._start()
        self._number, self.run = number, run
        with contextlib.suppress(OSError):  # `end` will notice
            self.connection.send(run)

    def end(self) -> tuple[int, Row]:
        """Receives the outcome; returns the index of the run and its row.

        Raises:
          UserError: the run raised it.
        """
        assert self.run is not None  # `begin` was called
        run, self.run = self.run, None
        try:
            row, error, exit_code = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            path = run.workdir / LOG
            row = run.labels | {'error': f'{_reason(self.process.exitcode)}; see {path}'}
            log.warning('%s: %s', run.workdir, row['error'])
        else:
            if error:
                raised = UserError(error)
                raised.exit_code = exit_code
                raise raised
        return self._number, row


def _reason(exit_code: int | None) -> str:
    """Says why a process has ended."""
    if exit_code == Interrupted.exit_code:
        return 'its process was stopped by a signal'
    if exit_code is None or exit_code >= 0:
        return f'its process ended with exit code {exit_code}'
    name = signal.Signals(-exit_code).name
    memory = ', perhaps because it ran out of memory' if name == 'SIGKILL' else ''
    return f'its process was killed by {name}{memory}'


@contextlib.contextmanager
def _workers(jobs: int, prepare: Callable[[], None]) -> Iterator[list[_Worker]]:
    """Starts worker processes; if the context is left early, they save and stop."""
    memory = {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{_SHARED_MEMORY / max(1, jobs):.3f}'}
    added = memory.keys() - os.environ.keys()
    os.environ.update({name: memory[name] for name in added})
    workers: list[_Worker] = []
    try:
        for cores in _divide_cores(jobs):
            workers.append(_Worker(cores, prepare))
        yield workers
    except BaseException:
        for worker in workers:
            worker.process.terminate()
        raise
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.join()
        for name in added:
            del os.environ[name]


def _divide_cores(jobs: int) -> list[set[int]]:
    """Divides the cores among the workers; empty sets if workers are not bound to cores."""
    if jax.default_backend() != 'cpu' or not hasattr(os, 'sched_getaffinity'):
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs] or [cores[i % len(cores)]]) for i in range(jobs)]


@contextlib.contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """Binds this thread, and the processes that it starts, to some cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _work(connection: Connection, prepare: Callable[[], None]) -> None:
    """Executes the runs that it receives; sends (row, message of a UserError, its exit code)."""
    os.setpgid(0, 0)  # Ctrl-C must reach only the parent, which sends SIGTERM
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    opened: Opened = {}
    try:
        prepare()
        with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has no more runs
            while True:
                run = connection.recv()
                _redirect_output(run.workdir / LOG)
                connection.send(_outcome(run, opened))
    except (KeyboardInterrupt, Interrupted) as error:
        print(f'stopped by a signal{f": {error}" if str(error) else ""}', flush=True)
        os._exit(Interrupted.exit_code)


def _outcome(run: Run, opened: Opened) -> tuple[Row, str, int]:
    try:
        return row_of(run, opened), '', 0
    except Interrupted:
        raise
    except UserError as error:
        return {}, str(error), error.exit_code
    except Exception as error:
        # Perhaps the other runs took the devices' memory: let those go on.
        traceback.print_exc()
        message = f'{type(error).__name__}: {first_line(error)}; see {run.workdir / LOG}'
        return run.labels | {'error': message}, '', 0


def _redirect_output(path: Path) -> None:
    """Appends the output of this process to a file from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with path.open('a') as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _stop_with_parent() -> None:
    """Stops this process, which saves first, when its parent ends for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(Interrupted.exit_code)
