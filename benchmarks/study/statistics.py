"""What the statistics of batch norm alone do to the pre-trained features, before any training step.

    python -m benchmarks.study.statistics --data=DIR --scale=cpu [--tasks] [--seeds] [--results=DIR]

The pre-trained network keeps its weights and gets the population statistics of other images; then a
logistic regression is fitted to its features, as in `probe.py`, and tested. Writes statistics.csv,
one row for each task, seed and kind of statistics, from which `benchmarks.study.tables` makes a
table.
"""

import argparse
import csv
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks.study import probe, tasks
from benchmarks.study.plan import Case
from xmixup_jax import mixing
from xmixup_jax.cli.program import run_and_exit, setup
from xmixup_jax.compute import augment
from xmixup_jax.compute.reestimation import population
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.selection import Data
from xmixup_jax.files import atomic_write
from xmixup_jax.models import forward
from xmixup_jax.models.normalization import batch_part
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.start import find_match
from xmixup_jax.run.train import backbone_weights

FILE = 'statistics.csv'
COLUMNS = ('scale', 'task', 'seed', 'statistics', 'top1')
PRETRAINED = 'pre-trained'
BATCHES = 20
IMAGES = {
    'target': lambda keys, target, matched, source: target,
    'xmixup, alpha 0.2': lambda *images: mixing.cross_domain_mixup(*images[:3], alpha=0.2)[0],
    'xmixup, alpha 1': lambda *images: mixing.cross_domain_mixup(*images[:3], alpha=1.0)[0],
    'target and matched source': lambda keys, *images: np.concatenate(images[:2]),
    'matched source': lambda keys, target, matched, source: matched,
    'whole source': lambda keys, target, matched, source: source,
}
"""The images that statistics are estimated on: what training-mode batch norm sees with fine-tuning,
XMixup and Co-Train, and as checks the matched classes of the source, and all of it."""


def statistics_of(config: ConfigDict, data: Data, task: Task, state: TrainState) -> dict[str, Any]:
    """`batch_stats` by kind of statistics.

    Args:
      config: of a run of `xmixup`.
      data: its records.
      task, state: the pre-trained network, see `probe.pretrained`.
    """
    match = find_match(config, backbone_weights(config), data)
    options = {
        'seed': config.seed,
        'batch_size': config.batch_size,
        'resize': config.resize,
        'num_threads': config.num_threads,
    }
    pairs = iter(train_batches(data, match, **options))
    whole_source = iter(train_batches(Data(data.source, None, None), None, **options))
    moments = {kind: [] for kind in IMAGES}

    @jax.jit
    def moments_of(params, batch_stats, images):
        def one_device(images):
            moved = forward(task.graphdef, params, batch_stats, images, train=True)[1]
            return batch_part(moved, batch_stats)

        found = jax.vmap(one_device, axis_name='batch')(images[None])
        return jax.tree.map(lambda x: x[0], found)

    @jax.jit
    def crops_of(keys, images):
        size = config.image_size
        images = augment.random_crop_flip(keys, images, size, config.flip, config.crop_min_area)
        return augment.normalize(images, config.model)

    network = jax.device_put((state.params, state.batch_stats))
    for batch, other in islice(zip(pairs, whole_source, strict=False), BATCHES):
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(batch['seed'])
        decoded = (batch['image'], batch['source_image'], other['image'])
        crops = [crops_of(keys[:, i], images) for i, images in enumerate(decoded)]
        for kind, images in IMAGES.items():
            found = moments_of(*network, images(keys[:, 3], *crops))
            moments[kind].append(jax.device_get(found))
    found = {PRETRAINED: jax.device_get(state.batch_stats)}
    found |= {kind: population(each) for kind, each in moments.items()}
    found['mean of pre-trained and target'] = jax.tree.map(
        lambda a, b: (a + b) / 2, found[PRETRAINED], found['target']
    )
    return found


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='statistics', add_help=False)  # `run_and_exit` gives help
    parser.add_argument('--data', required=True, type=Path)
    parser.add_argument('--results', default=Path(__file__).parent, type=Path)
    parser.add_argument('--scale', required=True, choices=tasks.SCALES)
    parser.add_argument('--tasks', default='')
    parser.add_argument('--seeds', default='0,1,2')
    args = parser.parse_args(argv[1:])
    names = args.tasks.split(',') if args.tasks else tasks.SCALES[args.scale].tasks
    tasks.check_data(args.data, list(names))
    rows = []
    with tqdm(total=len(names) * len(args.seeds.split(',')), unit='seed', disable=None) as bar:
        for name in names:
            for seed in map(int, args.seeds.split(',')):
                changes = {'method': 'xmixup'}  # which opens the source
                case = Case(args.scale, 'main', name, tasks.FEW, 'xmixup', '', seed, changes)
                config = case.configuration(args.data, Path('~/.cache/xmixup_jax'))
                setup(config.cache_dir)
                data = open_data(config)
                task, state = probe.pretrained(config)
                for kind, each in statistics_of(config, data, task, state).items():
                    tested = probe.fit(task, config, replace(state, batch_stats=each), data)
                    values = (args.scale, name, seed, kind, tested['top1'])
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
                bar.update()
                with atomic_write(args.results / FILE) as partial, partial.open('w') as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
