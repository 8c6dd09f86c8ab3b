"""Measures the input pipeline in pairs per second, for each cache of decoded images:

    python -m benchmarks.input --config=configs/tiny_caltech.py --config.resize=224 \\
        --config.image_size=224 --cores=1

Loads pairs of a target and a source image (JPEGs of 500x375 px) into batches on the host: without a
cache, and with all images already in each of the caches. (With the cache on the devices, batches
hold positions.) `opencv` is the cost of two images in OpenCV alone: decode, crop, scale by area.

With --step, the configuration's training step runs as well, in turns on real batches and on one
batch that stays on the device: `loop` is input and step together, `share` is its images/s divided
by those of the step alone.

  --images   images of the target and of the source, each (default: 2,000)
  --cores    cores to use (default: all)
  --caches   caches to measure: none, which must be first, memory, disk, device (default: all)
  --step     also run the training step
  --output   CSV file to write
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import numpy as np

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.data.pairing import usable_cores
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import replicate
from xmixup_jax.matching import ClassMatch
from xmixup_jax.run import loop
from xmixup_jax.run.inputs import open_input

CLASSES = 100
SECONDS = 6.0
KINDS = ('none', 'memory', 'disk', 'device')


def per_second(action: Callable[[], int]) -> float:
    """Calls `action` for about SECONDS; returns the sum of its results per second."""
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        count += action()
    return count / (time.perf_counter() - begun)


def opencv_alone(images: list[bytes], size: int) -> float:
    """Decodes and scales images with OpenCV; returns pairs per second on one core."""
    encoded = itertools.cycle(images)

    def one() -> int:
        image = cv2.imdecode(np.frombuffer(next(encoded), np.uint8), cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        left = (width - height) // 2
        square = np.ascontiguousarray(image[:, left : left + height])
        cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
        return 1

    return per_second(one) / 2


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='input', add_help=False)
    parser.add_argument('--images', default=2000, type=int)
    parser.add_argument('--cores', default=usable_cores(), type=int)
    parser.add_argument('--caches', default=','.join(KINDS))
    parser.add_argument('--step', action='store_true')
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    config, _ = read_command(rest)
    config.num_threads = 0
    images = [synthetic.photo(seed) for seed in range(200)]
    parts = [synthetic.records(name, CLASSES, images, args.images) for name in ('target', 'source')]
    match = ClassMatch(np.arange(CLASSES, dtype=np.int32)[:, None], np.ones((CLASSES, 1)))
    print(
        f'JPEGs of 500x375 px and {sum(map(len, images)) / len(images) / 1000:.0f} kB to '
        f'{config.resize} px, '
        f'{args.cores} cores'
    )
    alone = args.cores * opencv_alone(images, config.resize)
    rows = [{'cache': 'opencv', 'pairs/s': alone}]
    with tempfile.TemporaryDirectory() as folder:
        config.cache_dir = folder
        weights = synthetic.random_weights(config, Path(folder) / 'weights.safetensors')
        start = synthetic.start(config, 'xmixup', weights, CLASSES, Path(folder))
        for kind in args.caches.split(','):
            config.data.cache = kind
            # Drop what the previous cache has left.
            data = Data(parts[0], None, parts[1])
            for part in parts:
                part.store.decoded.clear()
            batches, pool, cached = open_input(config, data, match)
            for records in (cached.target, cached.source):
                if records.cache is not None:  # fill the cache, as a run's first epoch would
                    for i in range(len(records)):
                        records.image(i, config.resize)
            iterator = iter(batches)

            def next_batch(iterator=iterator) -> int:
                return len(next(iterator)['label'])

            row = {'cache': kind, 'pairs/s': per_second(next_batch)}
            if args.step:
                row |= step_rates(config, start, iterator, pool)
            rows.append(row)
    for row in rows:
        row['to opencv'] = row['pairs/s'] / alone
        row['to none'] = row['pairs/s'] / rows[1]['pairs/s']
    if args.step:
        rows[0] |= dict.fromkeys(('step images/s', 'loop images/s', 'share'), '')
        rows = [{key: row[key] for key in rows[-1]} for row in rows]
    synthetic.write_table(rows, args.output)


def step_rates(config, start, iterator, pool) -> dict[str, float]:
    """Measures images per second of the step alone and of the loop, in turns."""
    state = replicate(start.state)  # the steps donate it
    stop = loop.AgreedStop(lambda: False)
    real = loop.prefetch(iterator, config, 0, 10**9, stop)
    fixed = next(real)

    def rate(batches) -> float:
        nonlocal state
        count, begun = 0, None
        for _, batch, _ in batches:
            state, metrics = start.task.train_steps(start.constants, state, pool, batch)
            stop.after(metrics)
            if begun is None:  # the first step includes compilation or earlier work
                jax.block_until_ready(metrics)
                begun = time.perf_counter()
                continue
            count += config.batch_size * config.steps_per_dispatch
            if time.perf_counter() - begun > SECONDS:
                break
        jax.block_until_ready(metrics)
        return count / (time.perf_counter() - begun)

    pairs = [(rate(itertools.repeat(fixed)), rate(real)) for _ in range(3)]
    alone, together = np.median(pairs, axis=0)
    return {
        'step images/s': float(alone),
        'loop images/s': float(together),
        'share': float(np.median([b / a for a, b in pairs])),
    }


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
