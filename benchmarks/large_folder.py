"""Measures speed and memory of a large image folder, run as a user would run it:

    python -m benchmarks.large_folder --folder=/tmp/jpegs --images=100000

Writes JPEG images of 500x375 px in 100 classes (once). Then runs `prepare` and one epoch of
fine-tuning in separate processes, with a network so small that decoding dominates. Prints images
per second and the processes' memory (resident set) over time; --output writes them as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import synthetic

CLASSES = 100
BATCH = 200
TEST = 5  # test images per class


def write_image(task: tuple[Path, int]) -> None:
    """Writes one image, unless it exists."""
    path, seed = task
    if not path.exists():
        partial = path.with_suffix('.tmp')
        partial.write_bytes(synthetic.photo(seed))
        partial.rename(path)


def generate(folder: Path, images: int) -> None:
    tasks = []
    for split, count in (('train', images), ('test', CLASSES * TEST)):
        for c in range(CLASSES):
            (folder / split / f'{c:03d}').mkdir(parents=True, exist_ok=True)
        tasks += [
            (folder / split / f'{i % CLASSES:03d}' / f'{i:06d}.jpg', i + (split == 'test') * 2**31)
            for i in range(count)
        ]
    with Pool() as pool:
        list(tqdm(pool.imap_unordered(write_image, tasks, 100), 'writing images', len(tasks)))


def measured(command: list[str]) -> dict[str, float | list[int]]:
    """Runs a program; returns its seconds, and its memory in MB at each tenth of that time."""
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    memory = []
    while process.poll() is None:
        try:
            pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
        except (OSError, IndexError):
            break
        memory.append(pages * os.sysconf('SC_PAGE_SIZE') // 2**20)
        time.sleep(0.25)
    seconds = time.perf_counter() - begun
    if process.wait():
        raise SystemExit(f'{" ".join(command)} failed')
    places = np.linspace(0, len(memory) - 1, 11).astype(int)
    return {'seconds': round(seconds, 1), 'memory_mb': [memory[i] for i in places]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--folder', required=True, type=Path)
    parser.add_argument('--images', default=100_000, type=int)
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    generate(args.folder, args.images)
    cores = os.cpu_count()
    values = {
        'source.name': f'folder:{args.folder}',
        'target.name': f'folder:{args.folder}',
        'target.shots': 0,
        'target.test_split': 'test',
        'source.split': 'train',
        'resize': 36,
        'image_size': 32,
        'model.width': 4,
        'match.images_per_class': 0,
        'match.assignment': 'nearest',
        'pretrain.steps': 10,
        'pretrain.batch_size': BATCH,
        'steps': args.images // BATCH,
        'batch_size': BATCH,
        'eval_batch_size': 250,
        'checkpoint_every': 10**6,
        'num_threads': cores,
        'data.cache': 'none',
        'source.test_split': '',
        'cache_dir': args.folder / 'cache',
    }
    flags = ['--config=configs/digits.py', *(f'--config.{k}={v}' for k, v in values.items())]
    workdir = args.folder / f'run-{time.time_ns()}'
    python = [sys.executable, '-m']
    results = {'images': args.images, 'cores': cores}
    # Source and target are the same images, so `prepare` reads them once for the class features.
    results['prepare'] = measured(
        [*python, 'xmixup_jax', 'prepare', *flags, f'--workdir={workdir}/prepare']
    )
    results['epoch'] = measured(
        [*python, 'xmixup_jax.main', *flags, '--config.method=finetune', f'--workdir={workdir}/run']
    )
    results['epoch']['images_per_second'] = json.loads((workdir / 'run/result.json').read_text())[
        'images_per_second'
    ]
    for phase in ('prepare', 'epoch'):
        rate = args.images / results[phase]['seconds']
        print(
            f'{phase}: {results[phase]["seconds"]} s, {rate:.0f} images/s, {rate / cores:.0f} per '
            f'core; MB at each tenth: {" ".join(map(str, results[phase]["memory_mb"]))}'
        )
    print(f'epoch without startup and test: {results["epoch"]["images_per_second"]} images/s')
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
