"""Runs the study, or continues it; runs.csv gets a row as soon as a run has finished.

    python -m benchmarks.study.run --data=DIR --workdir=DIR --scale=cpu
    XLA_PYTHON_CLIENT_PREALLOCATE=false \\
        python -m benchmarks.study.run --data=DIR --workdir=DIR --scale=full --jobs=7

  --data     holds the image folders imagenet_multi_176/train/CLASS and NAME_176/{train,test}/CLASS
  --workdir  gets compiled programs, features and the runs under way
  --results  gets runs.csv (default: this file's folder); runs that it lists are not made again
  --scale    full: needs a GPU; cpu: smaller images, fewer steps, three tasks
  --parts    of the study, comma-separated (default: all that plan.py lists)
  --tasks    likewise (default: all of the scale)
  --shots    images a class, likewise; 0 is all of them (default: 6,0)
  --names    likewise, in the order in which they are to run (default: all that names.py lists)
  --seeds    likewise (default: 0,1,2,3,4)
  --jobs     processes, each on cores of its own (default: one a core)

A study that was stopped goes on where it was. Tables and figures are made from runs.csv, whatever
it holds by then, by

    python -m benchmarks.study.tables

Exit code 0: done; 1 runs failed (runs.csv says which and why) or something is missing; 75 stopped
by a signal, run the same command again.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks.study import plan, tasks
from benchmarks.study.names import NAMES, PROBE
from benchmarks.study.plan import Case, Group, Row
from benchmarks.study.probe import probe
from xmixup_jax.checks import validate
from xmixup_jax.cli.program import run_and_exit, setup, use_huge_pages
from xmixup_jax.data.selection import Opened
from xmixup_jax.errors import ConfigError, Interrupted, UserError
from xmixup_jax.files import METRICS
from xmixup_jax.run.grid import Run, row_of
from xmixup_jax.run.inputs import open_data


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='run', add_help=False)  # `run_and_exit` gives help
    parser.add_argument('--data', required=True, type=Path)
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--results', default=Path(__file__).parent, type=Path)
    parser.add_argument('--scale', required=True, choices=tasks.SCALES)
    parser.add_argument('--parts', default=','.join(plan.PARTS))
    parser.add_argument('--tasks', default='')
    parser.add_argument('--shots', default='6,0')
    parser.add_argument('--names', default=','.join(NAMES))
    parser.add_argument('--seeds', default='0,1,2,3,4')
    parser.add_argument('--jobs', default=len(os.sched_getaffinity(0)), type=int)
    args = parser.parse_args(argv[1:])
    of_scale = tasks.SCALES[args.scale].tasks
    wanted = plan.Wanted(
        scale=args.scale,
        parts=_some('parts', args.parts, plan.PARTS),
        tasks=_some('tasks', args.tasks or ','.join(of_scale), of_scale),
        shots=tuple(map(int, args.shots.split(','))),
        names=_some('names', args.names, tuple(NAMES)),
        seeds=tuple(map(int, args.seeds.split(','))),
    )
    try:
        study(wanted, args.data, args.workdir, args.results, args.jobs)
    except KeyboardInterrupt:
        pass  # with it goes the traceback, which keeps the closed pool alive
    else:
        return
    raise Interrupted(
        f'stopped by a signal; finished runs are in {args.results}: the same command continues'
    )


def _some(flag: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(given.split(','))
    unknown = [each for each in chosen if each not in known]
    if unknown:
        raise ConfigError(f'--{flag}: {unknown[0]} is not one of {", ".join(known)}')
    return chosen


def study(wanted: plan.Wanted, data: Path, workdir: Path, results: Path, jobs: int) -> None:
    """Makes all runs that are wanted and that runs.csv does not list.

    Raises:
      UserError: runs failed, now or earlier.
    """
    tasks.check_data(data, list(wanted.tasks))
    results.mkdir(parents=True, exist_ok=True)
    table = results / plan.RUNS
    phases, begun = list(plan.phases(wanted)), set()
    running: set[Future] = set()
    with workers(jobs, workdir) as pool, tqdm(unit='group', disable=None) as bar:
        while True:
            for group in next_groups(phases, plan.by_key(plan.read(table)), begun):
                if len(running) == jobs:
                    break
                bar.set_description(f'{group[0].part} {group[0].name} {group[0].task}')
                begun |= {case.key for case in group}
                running.add(pool.submit(make, group, data, workdir, table))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                bar.update()
    failed = sum(bool(row['error']) for row in plan.read(table))
    if failed:
        raise UserError(f'{failed} runs failed: {table} says why')


def next_groups(phases: list[plan.Phase], found: plan.Found, begun: set[tuple]) -> Iterator[Group]:
    """The groups that can run now, the most urgent first.

    Args:
      phases: of the study.
      found: the rows that there are.
      begun: keys of cases that have been begun; extended by the caller.

    Raises:
      NotTuned: nothing is running, and no group that is left can run.
    """
    waiting = None
    for phase in phases:
        try:
            groups = list(phase(found))
        except plan.NotTuned as error:
            waiting = waiting or error
            continue
        for group in groups:
            left = [case for case in group if case.key not in found and case.key not in begun]
            if left:
                yield left
    if waiting is not None and begun <= found.keys():
        raise waiting


@contextlib.contextmanager
def workers(jobs: int, workdir: Path):
    """A pool of processes, each bound to its share of the cores, which log to workdir/coreN.log.

    When the context is left early they save and end.
    """
    context = multiprocessing.get_context('spawn')
    usable = sorted(os.sched_getaffinity(0))
    cores = context.Queue()
    for i in range(jobs):
        cores.put(usable[i::jobs] or [usable[i % len(usable)]])
    if jobs >= len(usable):  # one core for each process
        flags = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'.strip()
    # NumPy's library counts the cores of the whole machine; with more threads than cores of its
    # own a process fits a logistic regression 40 times as slowly.
    for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
        os.environ[name] = str(max(1, len(usable) // jobs))
    workdir.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(jobs, context, _bind, (cores, workdir))
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        if sys.exc_info()[0]:
            for process in processes:
                os.kill(process.pid, signal.SIGTERM)
        pool.shutdown(cancel_futures=True)


def _bind(cores, workdir: Path) -> None:
    own = cores.get()
    os.sched_setaffinity(0, own)
    with (workdir / f'core{own[0]}.log').open('a') as log:
        for stream in (1, 2):  # the terminal shows the progress of the whole study
            os.dup2(log.fileno(), stream)


_opened: Opened = {}  # data sets, with their decoded images, of this process's runs


def make(group: Group, data: Path, workdir: Path, table: Path) -> None:
    """Makes runs one after the other and adds a row to runs.csv for each.

    The group shares its compiled steps, since its runs differ in nothing but seed and learning rate
    (`step.make_task`). Another choice of batch norm is another program. A name's run in `main` has
    the program of its tuning run, which it finds in the compilation cache of `workdir`.
    """
    for case in group:
        append(table, _make(case, data, workdir))
        shutil.rmtree(run_folder(workdir, case.key), ignore_errors=True)
    jax.clear_caches()


def _make(case: Case, data: Path, workdir: Path) -> Row:
    scale = tasks.SCALES[case.scale]
    if scale.needs_gpu and jax.default_backend() == 'cpu':
        raise ConfigError(f'--scale={case.scale} needs a GPU, and JAX finds none: --scale=cpu')
    config = case.configuration(data, workdir / 'cache')
    validate(config, jax.device_count())
    setup(config.cache_dir)
    logging.getLogger('xmixup_jax').setLevel(logging.WARNING)
    row = case._asdict() | {'changes': plan.text(case.changes)}
    row |= {
        'batch_norm': config.batch_norm,
        'learning_rate': '' if case.name == PROBE else config.optimizer.learning_rate,
    }
    if case.name == PROBE:
        result = probe(config, open_data(config, _opened))
        return row | result | {'device': result['devices']}
    folder = run_folder(workdir, case.key)
    try:
        row = row_of(Run(config, folder, row), _opened)
    except Interrupted:  # it has saved; as an exception the pool would hand out the next runs
        os._exit(Interrupted.exit_code)
    if 'error' in row:
        return row
    with (folder / METRICS).open() as file:
        *_, last = csv.DictReader(file)
    return row | {'train_top1': last['top1'], 'device': row['devices']}


def run_folder(workdir: Path, key: tuple) -> Path:
    return workdir.joinpath('runs', *map(str, key))


def append(path: Path, row: Row) -> None:
    """Adds a row to the table; makes it, with its header, if there is none.

    Several processes may do so at once.
    """
    line = io.StringIO()
    with path.open('a', newline='') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(line, plan.COLUMNS, extrasaction='ignore', restval='')
        if not path.stat().st_size:
            writer.writeheader()
        writer.writerow(row)
        file.write(line.getvalue())


if __name__ == '__main__':
    use_huge_pages()
    run_and_exit(run, sys.argv)
