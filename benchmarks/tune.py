"""Tunes one hyper-parameter of every method on images held out of the training set.

    python -m benchmarks.tune --config=configs/tiny_caltech.py --workdir=DIR --seeds=0 \
        --config.target.shots=5 --config.target.test_split=rest

Tries three values of each method's main coefficient, including the published one. Fine-tuning is
first and tries three learning rates; all other methods use the best one. `test_split` must name
images on which the final comparison does not test: 'rest' is the part of the training split that
the few-shot draw leaves over. Finished runs are reused. Writes tuned.csv (one row per run) and
tuned.txt (the flags that set the chosen values; pass them to `xmixup compare`) into --workdir.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.cli.program import setup
from xmixup_jax.errors import UserError
from xmixup_jax.run.train import train_and_evaluate

# The first value is the default; it wins ties.
GRIDS = {
    'finetune': ('optimizer.learning_rate', (0.03, 0.01, 0.1)),
    'l2sp': ('l2sp.alpha', (0.01, 0.001, 0.1)),
    'delta': ('delta.alpha', (0.01, 0.001, 0.1)),
    'fsp': ('fsp.weight', (50.0, 5.0, 0.5)),
    'bss': ('bss.eta', (0.001, 0.0001, 0.01)),
    'dtnh': ('dtnh.alpha', (0.01, 0.001, 0.1)),
    'seqtrain': ('seqtrain.steps', (600, 300, 150)),
    'cotrain': ('cotrain.weight', (0.5, 0.2, 0.05)),
    'xmixup': ('xmixup.alpha', (0.2, 0.1, 0.5)),
    'mixup': ('mixup.alpha', (0.2, 0.5, 1.0)),
    'cutmix': ('cutmix.alpha', (1.0, 0.5, 0.2)),
    'lwf': ('lwf.weight', (1.0, 0.3, 4.0)),
    'stochnorm': ('stochnorm.p', (0.5, 0.25, 0.75)),
    'cotuning': ('cotuning.weight', (2.3, 0.7, 0.2)),
    'bituning': ('bituning.weight', (1.0, 0.3, 0.1)),
    'rifle': ('rifle.periods', (2, 3, 4)),
    'smile': ('smile.feature_weight', (0.01, 0.001, 0.1)),
    'mars': ('mars.distance', (20.0, 5.0, 1.0)),
    'mmd': ('mmd.weight', (0.1, 0.01, 1.0)),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--workdir', required=True, type=Path, help='holds a folder for each run')
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--methods', default=','.join(GRIDS))
    args, config_args = parser.parse_known_args(argv)
    seeds = args.seeds.split(',')
    methods = args.methods.split(',')
    methods.sort(key=lambda method: method != 'finetune')

    rows, chosen = [], []
    with tqdm(total=3 * len(seeds) * len(methods), unit='run', disable=None) as bar:
        for method in methods:
            key, values = GRIDS[method]
            means = []
            for value in values:
                top1 = []
                for seed in seeds:
                    flags = [f'--config.method={method}', f'--config.seed={seed}', *chosen]
                    flags.append(f'--config.{key}={value}')
                    config, _ = parse_flags(['tune', *config_args, *flags])
                    validate(config, jax.device_count())
                    setup(config.cache_dir)
                    folder = args.workdir / method / f'{key}={value:g}' / f'seed{seed}'
                    result = train_and_evaluate(config, folder)
                    top1.append(100 * result['top1'])
                    rows.append(
                        {'method': method, 'key': key, 'value': value, 'seed': seed}
                        | {'held_out_images': result['test_images'], 'top1': top1[-1]}
                    )
                    bar.update()
                means.append(statistics.mean(top1))
            chosen.append(f'--config.{key}={values[means.index(max(means))]}')
            write(args.workdir, rows, chosen)
    print('\n'.join(chosen))


def write(workdir: Path, rows: list[dict], chosen: list[str]) -> None:
    with (workdir / 'tuned.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (workdir / 'tuned.txt').write_text('\n'.join(chosen) + '\n')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'tune: {error}')
