"""Runs the study, or continues it; runs.csv and curves.csv get a row for each run that has ended.

    python -m benchmarks.study.run --data=DIR --workdir=DIR

  --data     holds tiny_imagenet/{train,validation}/CLASS and caltech101_64/{train,test}/CLASS
  --workdir  gets the networks trained on the sources, and the runs under way
  --results  gets the two tables (default: this file's folder); runs that are in them are not made
  --parts    of the study, comma-separated, in any order (default: all that plan.py lists, but for
             `large`, which needs a GPU; with XLA_PYTHON_CLIENT_PREALLOCATE=false several --jobs
             share it)
  --tasks    likewise (default: digits,caltech,animals,vehicles,food,household)
  --seeds    likewise (default: 0,1,2,3,4)
  --jobs     processes, each on cores of its own (default: one a core)

A study that was stopped goes on where it was. Tables and figures are made of runs.csv, whatever
has ended by then, by

    python -m benchmarks.study.tables

Exit code 0: done; 1 runs failed (runs.csv says which and why) or something is missing; 75 stopped
by a signal, run the same command again.
"""

import argparse
import contextlib
import csv
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks.study import plan, tasks, variants
from benchmarks.study.plan import Case, Row
from xmixup_jax import config as config_lib
from xmixup_jax.data.sources import Opened
from xmixup_jax.errors import Interrupted, UserError
from xmixup_jax.loop import Diverged
from xmixup_jax.main import ended, setup
from xmixup_jax.methods import METHODS
from xmixup_jax.train import backbone_weights, open_data, train_and_evaluate
from xmixup_jax.workdir import METRICS


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='run', add_help=False)  # `ended` gives help
    parser.add_argument('--data', required=True, type=Path)
    parser.add_argument('--workdir', required=True, type=Path)
    parser.add_argument('--results', default=Path(__file__).parent, type=Path)
    parts = [part for part in plan.PARTS if part not in plan.LARGE]
    parser.add_argument('--parts', default=','.join(parts))
    parser.add_argument('--tasks', default=','.join(tasks.TASKS))
    parser.add_argument('--seeds', default='0,1,2,3,4')
    parser.add_argument('--jobs', default=len(os.sched_getaffinity(0)), type=int)
    args = parser.parse_args(argv[1:])
    try:
        study(args)
    except KeyboardInterrupt:
        pass  # with it goes what refers to the pool, which is closed thereby
    else:
        return
    raise Interrupted(
        f'stopped by a signal; what has ended is in {args.results}: the same command continues'
    )


def study(args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    images = args.workdir / 'images'
    tasks.link_images(args.data, images)
    names, seeds = args.tasks.split(','), [int(seed) for seed in args.seeds.split(',')]
    with workers(args.jobs, args.workdir) as pool:
        for part in args.parts.split(','):
            large = part in plan.LARGE
            sources = plan.photographs(names) if large else names
            networks = [(name, images, large) for name in sources]
            for _ in _results(pool, pretrain, networks, 'pre-training'):
                pass
            for phase in plan.PARTS[part]:
                runs, curves = args.results / plan.RUNS, args.results / plan.CURVES
                found = plan.read(runs)
                done = {plan.key(row) for row in found}
                missing = [
                    [case for case in group if case.key not in done]
                    for group in phase(names, seeds, found)
                ]
                work = [(group, args.workdir) for group in missing if group]
                for finished in _results(pool, make, work, part):
                    append(
                        curves, plan.CURVE_COLUMNS, [row for _, rows in finished for row in rows]
                    )
                    append(runs, plan.COLUMNS, [row for row, _ in finished])
                    for row, _ in finished:
                        shutil.rmtree(run_folder(args.workdir, plan.key(row)), ignore_errors=True)
    failed = sum(bool(row['error']) for row in plan.read(args.results / plan.RUNS))
    if failed:
        raise UserError(f'{failed} runs failed: {args.results / plan.RUNS} says why')


@contextlib.contextmanager
def workers(jobs: int, workdir: Path):
    """A pool of processes, each bound to its share of the cores, that write what they have to say
    into workdir/core*.log; when it is left early, they save and end."""
    context = multiprocessing.get_context('spawn')
    usable = sorted(os.sched_getaffinity(0))
    cores = context.Queue()
    for i in range(jobs):
        cores.put(usable[i::jobs] or [usable[i % len(usable)]])
    # The other cores have runs of their own.
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'.strip()
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
        for stream in (1, 2):  # the terminal is for the whole study's progress
            os.dup2(log.fileno(), stream)
    METHODS[variants.NAME] = variants.METHOD


def _results(pool: ProcessPoolExecutor, function, work: list[tuple], title: str):
    futures = [pool.submit(function, *args) for args in work]
    bar = tqdm(as_completed(futures), total=len(futures), desc=title, disable=None)
    for future in bar:
        yield future.result()


def pretrain(task: str, images: Path, large: bool) -> None:
    """Trains the task's network on its source, unless that has been done."""
    config = tasks.configuration(task, images, large)
    _set_up(config)
    backbone_weights(config)


_opened: Opened = {}  # data sets, with their decoded images, of this process's runs


def make(group: list[Case], workdir: Path) -> list[tuple[Row, list[Row]]]:
    """Makes runs that share their compiled steps.

    Returns:
      for each its row of runs.csv and its rows of curves.csv.
    """
    rows = [_make(case, workdir) for case in group]
    jax.clear_caches()
    return rows


def _make(case: Case, workdir: Path) -> tuple[Row, list[Row]]:
    config = case.configuration(workdir / 'images')
    _set_up(config)
    if config.source.shots:  # fewer images for the mixing, not for the pre-training
        whole = tasks.configuration(case.task, workdir / 'images')
        config.weights = str(backbone_weights(whole).path)
    labels = case._asdict() | {'changes': plan.text(case.changes)}
    folder = run_folder(workdir, case.key)
    try:
        result = train_and_evaluate(config, folder, open_data(config, _opened))
    except Diverged as error:
        return labels | {'error': str(error)}, []
    except Interrupted:  # it has saved; as an exception the pool would hand out the next runs
        os._exit(Interrupted.exit_code)
    with (folder / METRICS).open() as file:
        curve = [labels | row for row in csv.DictReader(file)]
    return labels | result | {'train_top1': curve[-1]['top1']}, curve


def _set_up(config) -> None:
    config_lib.validate(config, jax.device_count())
    setup(config)
    logging.getLogger('xmixup_jax').setLevel(logging.WARNING)


def run_folder(workdir: Path, key: tuple) -> Path:
    return workdir.joinpath('runs', *map(str, key))


def append(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Adds rows to a table; makes it, with its header, if there is none."""
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore', restval='')
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    ended(run, sys.argv)
