"""Runs one experiment for every combination of some values and every seed, and tabulates top-1.

    python -m benchmarks.sweep --config=configs/digits.py --workdir=sweeps/digits \
        --vary=method=finetune,xmixup --vary=target.shots=2,5,10 --seeds=0,1,2,3,4

Finished runs are reused, so a sweep can be stopped and resumed, or extended by more values. Writes
sweep.csv (one row per run) and sweep.md (mean and standard deviation over seeds) into --workdir.
"""

import argparse
import csv
import itertools
import statistics
import sys
from pathlib import Path

import jax

from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.cli.program import setup
from xmixup_jax.errors import UserError
from xmixup_jax.run.grid import Run, rows_of


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--workdir', required=True, type=Path, help='holds a folder for each run')
    parser.add_argument(
        '--vary', action='append', default=[], metavar='KEY=V1,V2', help='repeatable'
    )
    parser.add_argument('--seeds', default='0,1,2,3,4')
    args, config_args = parser.parse_known_args(argv)
    keys = [vary.split('=', 1)[0] for vary in args.vary]
    grid = list(itertools.product(*(vary.split('=', 1)[1].split(',') for vary in args.vary)))
    seeds = args.seeds.split(',')

    runs = []
    for values, seed in itertools.product(grid, seeds):
        chosen = dict(zip(keys, values, strict=True))
        overrides = [f'--config.{key}={value}' for key, value in chosen.items()]
        config, _ = parse_flags(['sweep', *config_args, *overrides, f'--config.seed={seed}'])
        validate(config, jax.device_count())
        name = '-'.join(f'{key.split(".")[-1]}={value}' for key, value in chosen.items())
        folder = args.workdir / (name or 'run') / f'seed{seed}'
        runs.append(Run(config, folder, chosen | {'seed': seed}))
    setup(runs[0].config.cache_dir)
    rows = []
    for row in rows_of(runs, 'sweep'):
        if 'error' in row:
            raise UserError(row['error'])
        columns = (*keys, 'seed', 'seconds')
        rows.append({key: row[key] for key in columns} | {'top1': 100 * row['top1']})
        jax.clear_caches()

    with (args.workdir / 'sweep.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = markdown(rows, keys)
    (args.workdir / 'sweep.md').write_text(table)
    print(table)


def markdown(rows: list[dict], keys: list[str]) -> str:
    """Formats one row per combination: mean and sample standard deviation of top-1 over seeds."""
    lines = [
        '| ' + ' | '.join([*keys, 'top-1 %', 'seeds']) + ' |',
        '|' + ' --- |' * (len(keys) + 2),
    ]
    for values, group in itertools.groupby(rows, lambda row: [row[key] for key in keys]):
        top1 = [row['top1'] for row in group]
        spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
        lines.append(
            '| '
            + ' | '.join(map(str, [*values, f'{statistics.mean(top1):.2f}{spread}', len(top1)]))
            + ' |'
        )
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'sweep: {error}')
