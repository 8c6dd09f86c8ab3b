"""Measures how training options change fine-tuning and XMixup, with 6 images per class.

    python -m benchmarks.options --data=DIR --workdir=DIR
    python -m benchmarks.options --data=DIR --workdir=DIR --tasks=scene15 --options=label_smoothing

  --data     folder of the study's image folders; see benchmarks/study
  --workdir  gets a folder for each run; finished runs are reused
  --tasks    tasks of the study, comma-separated (default: flowers17,scene15)
  --options  names from `OPTIONS`, comma-separated (default: all)
  --seeds    seeds, comma-separated (default: 0,1,2)
  --results  CSV file with a row for each run (default: benchmarks/results/options.csv); several
             processes may share it and --workdir
  --table    only print the table of the existing results

The setting is the study's `cpu` scale: EfficientNet-Lite0 with ImageNet weights, 112 px, 100 steps,
pre-trained batch-norm statistics, and the learning rate that the study chose. Each option changes
only its own values; none is tuned. The average of the weights and several test views need no
further training, so they are measured on the runs without options.
"""

import argparse
import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.study import tasks
from xmixup_jax.checks import validate
from xmixup_jax.cli.program import setup
from xmixup_jax.errors import UserError
from xmixup_jax.files import atomic_write, file_lock
from xmixup_jax.predictor import load
from xmixup_jax.report.tables import half_interval
from xmixup_jax.run.grid import Run, row_of
from xmixup_jax.run.inputs import open_data

RESULTS = Path(__file__).with_name('results') / 'options.csv'
METHODS = {
    'finetune': {'method': 'finetune', 'optimizer.learning_rate': 0.001},
    'xmixup': {'method': 'xmixup', 'optimizer.learning_rate': 0.003},
}
BASE = 'none'
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {'ema_decay': 0.99},
    'label_smoothing': {'label_smoothing': 0.1},
    'trivialaugment': {'augment.policy': 'trivialaugment'},
    'freeze': {'freeze': '4'},  # of five stages
    'layer_decay': {'optimizer.layer_decay': 0.75},
    'validation': {'target.validation_share': 0.2, 'eval_every': 20},
    'erasing': {'augment.erasing': 0.25},
    'adamw': {
        'optimizer.name': 'adamw',
        'optimizer.learning_rate': 0.0003,
        'optimizer.decayed': 'kernels',
    },
}
VIEWS = (2,)  # ten would take longer than the training
COLUMNS = ('task', 'method', 'option', 'seed', 'top1', 'loss', 'seconds', 'commit')

Row = dict[str, Any]


def run_of(task: str, method: str, option: str, seed: int, data: Path, workdir: Path) -> Run:
    """Returns the run of one cell of the table."""
    config = tasks.configuration(task, 'cpu', tasks.FEW, tasks.LITE0, data, workdir / 'cache')
    config.batch_norm, config.seed = 'frozen', seed
    config.update_from_flattened_dict(METHODS[method] | OPTIONS[option])
    validate(config, jax.device_count())
    labels = {'task': task, 'method': method, 'option': option, 'seed': seed}
    return Run(config, workdir / task / method / option / f'seed{seed}', labels)


def rows_of(run: Run) -> list[Row]:
    """Makes a run and returns its row; without options, also rows of its average and its views."""
    row = row_of(run, {})
    if 'error' in row:
        raise UserError(row['error'])
    rows = [row]
    if row['option'] == BASE:
        rows.append(row | {'option': 'ema', 'top1': row['ema_top1'], 'loss': row['ema_loss']})
        test = open_data(run.config).test
        for views in VIEWS:
            metrics = load(run.workdir, views=views).test(test).metrics
            rows.append(row | {'option': f'views {views}'} | metrics)
    return [{key: each[key] for key in COLUMNS} for each in rows]


def read(path: Path) -> list[Row]:
    """Reads the existing rows, as text."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def add(path: Path, new: list[Row], workdir: Path) -> None:
    """Adds rows, replacing those of the same runs."""
    with file_lock(workdir / 'results.lock', '--workdir', wait=True):
        cells = [[str(row[key]) for key in COLUMNS[:4]] for row in new]
        kept = [row for row in read(path) if [row[key] for key in COLUMNS[:4]] not in cells]
        with atomic_write(path) as partial, partial.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows([*kept, *new])


def table(rows: list[Row]) -> str:
    """Formats the gains in top-1 over the run without options with the same seed, in points.

    The mean over the tasks has ± half of its 95 % interval over the seeds.
    """
    top1 = {tuple(row[key] for key in COLUMNS[:4]): 100 * float(row['top1']) for row in rows}
    names = list(dict.fromkeys(row['option'] for row in rows if row['option'] != BASE))
    found = sorted({row['task'] for row in rows})
    seeds = sorted({row['seed'] for row in rows})
    lines = [
        '| option | ' + ' | '.join(f'{m}, {t}' for m in METHODS for t in (*found, 'mean')) + ' |',
        '| --- |' + ' ---: |' * (len(METHODS) * (len(found) + 1)),
    ]
    base = [f'`{BASE}`, top-1 %']
    for method in METHODS:
        means = [np.mean([top1[t, method, BASE, s] for s in seeds]) for t in found]
        base += [f'{each:.1f}' for each in (*means, np.mean(means))]
    lines.append('| ' + ' | '.join(base) + ' |')
    for option in names:
        cells = [f'`{option}`']
        for method in METHODS:
            cells += _differences(top1, method, option, found, seeds)
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _differences(top1, method: str, option: str, found: list[str], seeds: list[str]) -> list[str]:
    keys = [(t, method, option, s) for t in found for s in seeds]
    if not all(key in top1 for key in keys):
        return [''] * (len(found) + 1)
    gains = np.array(
        [[top1[t, method, option, s] - top1[t, method, BASE, s] for s in seeds] for t in found]
    )
    means = gains.mean(axis=0)
    interval = f' ± {half_interval(means):.1f}' if len(seeds) > 1 else ''
    return [f'{each:+.1f}' for each in gains.mean(axis=1)] + [f'{means.mean():+.1f}{interval}']


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path)
    parser.add_argument('--workdir', type=Path)
    parser.add_argument('--tasks', default='flowers17,scene15')
    parser.add_argument('--options', default=','.join(OPTIONS))
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--results', default=RESULTS, type=Path)
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args(argv)
    if not args.table:
        if args.data is None or args.workdir is None:
            parser.error('give --data and --workdir, or --table')
        setup(str(args.workdir / 'cache'))
        chosen = itertools.product(
            args.options.split(','), args.tasks.split(','), METHODS, map(int, args.seeds.split(','))
        )
        for option, task, method, seed in chosen:
            run = run_of(task, method, option, seed, args.data, args.workdir)
            add(args.results, rows_of(run), args.workdir)
    print(table(read(args.results)))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'options: {error}')
