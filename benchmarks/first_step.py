"""Measures what a user waits for between the command and the first step, part by part:

    python -m benchmarks.first_step --data=DIR --config=configs/folder.py

The source is a synthetic data set of tfds with ImageNet's classes; each image is a tiny JPEG, so
reading is faster than with photographs. The target is an image folder of 100 classes with 10 photos
each. Each row is a process of its own. The first has an empty cache. `again` is another run with
the same cache, which has compiled programs, labels and class means. The columns are seconds:

  import   from the start of the process to the end of its imports
  data     to open target and source; reads all of the source's labels, unless they are cached
  weights  to read the pre-trained weights
  classes  to match classes
  network  for the first state, on the devices
  save     for the first checkpoint
  batch    for the first batch and everything else
  step     for the first step, most of it compilation

  --data      folder for the data sets, which are written once (1 kB for each record)
  --records   number of source records (default: 1281167, as many as ImageNet has)
  --output    CSV file to write
  --config    experiment file, and any --config.KEY=VALUE
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from unittest import mock

import jax
import tensorflow_datasets as tfds

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit, use_huge_pages
from xmixup_jax.compute import step
from xmixup_jax.data.names import imagenet_ids
from xmixup_jax.run import start, train
from xmixup_jax.run.checkpoint import Checkpoints

CLASSES, PHOTOS = 100, 10  # of the target
RECORDS = 1_281_167
PARTS = ('import', 'data', 'weights', 'classes', 'network', 'save', 'batch', 'step')


class SyntheticImagenet(tfds.core.GeneratorBasedBuilder):
    """Records with ImageNet's classes, all of them the same few tiny images."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, records: int = RECORDS, **kwargs):
        self._records = records
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=list(imagenet_ids()))
        features = {'image': tfds.features.Image(), 'label': label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        return {'train': self._generate_examples()}

    def _generate_examples(self) -> Iterator:
        # Tiny, since without TensorFlow tfds can shuffle 1 GB at most.
        images = [synthetic.photo(seed, 8, 8) for seed in range(8)]
        for i in range(self._records):
            yield i, {'image': BytesIO(images[i % 8]), 'label': i % 1000}


class Parts:
    """Measures the seconds of each part, without those of the parts within it."""

    def __init__(self, begun: float):
        self.seconds: Counter[str] = Counter()
        self._last, self._open = begun, ['import']

    def _switch(self) -> None:
        now = time.time()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """A function that does the same, and counts as this part."""

        def run(*args, **kwargs):
            with self.part(name):
                return jax.block_until_ready(function(*args, **kwargs))

        return run


class FirstStepDone(Exception):
    """Ends the measured run."""


def measure(argv: list[str], begun: float) -> dict[str, float]:
    """Starts a run, up to its first step; returns the seconds of each part.

    Args:
      argv: the command line of a run.
      begun: time at which the process was started.
    """
    parts = Parts(begun)

    def map_train_steps(function):
        mapped = parts.timed('step', step_map(function))

        def first(*args):
            mapped(*args)
            raise FirstStepDone

        return first

    step_map = step.map_train_steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.part('batch'))
        for module, function, name in (
            (train, 'check_inputs', 'data'),
            (train, 'same_data', 'data'),
            (train, 'backbone_weights', 'weights'),
            (start, 'find_match', 'classes'),
            (train, 'begin', 'network'),
            (Checkpoints, 'save', 'save'),
        ):
            timed = parts.timed(name, getattr(module, function))
            stack.enter_context(mock.patch.object(module, function, timed))
        stack.enter_context(mock.patch.object(step, 'map_train_steps', map_train_steps))
        config, workdir = read_command(argv)
        with contextlib.suppress(FirstStepDone):
            train.train_and_evaluate(config, workdir)
    return {name: parts.seconds[name] for name in PARTS}


def write_data(folder: Path, records: int) -> list[str]:
    """Writes source and target, unless they are there; returns the flags that name them."""
    builder = SyntheticImagenet(records, data_dir=folder / str(records), file_format='array_record')
    builder.download_and_prepare()
    target = folder / 'target'
    for c in range(CLASSES):
        (target / f'class{c}').mkdir(parents=True, exist_ok=True)
        for i in range(PHOTOS):
            path = target / f'class{c}' / f'{i}.jpg'
            if not path.exists():
                # The same picture with other grain: classes that a linear head can tell apart.
                path.write_bytes(synthetic.photo(c, 500 + i))
    return [
        f'--config.data_dir={folder / str(records)}',
        f'--config.source.name={builder.name}',
        '--config.source.split=train',
        '--config.source.test_split=',
        f'--config.target.name=folder:{target}',
    ]


def run(argv: list[str]) -> None:
    if argv[1:2] and argv[1].startswith('--begun='):
        print(json.dumps(measure(['train', *argv[2:]], float(argv[1].partition('=')[2]))))
        sys.stdout.flush()
        os._exit(0)  # the prefetching threads of the run are still reading
    parser = argparse.ArgumentParser(prog='first_step', add_help=False)
    parser.add_argument('--data', required=True, type=Path)
    parser.add_argument('--records', default=RECORDS, type=int)
    parser.add_argument('--output', type=Path)
    args, config = parser.parse_known_args(argv[1:])
    flags = write_data(args.data, args.records)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(('first', 'again')):
            own = [f'--workdir={folder}/run{number}', f'--config.cache_dir={folder}/cache']
            command = [sys.executable, '-m', 'benchmarks.first_step', f'--begun={time.time()}']
            done = subprocess.run(
                [*command, *config, *flags, *own], stdout=subprocess.PIPE, text=True, check=True
            )
            seconds = json.loads(done.stdout.splitlines()[-1])
            rows.append({'run': name} | seconds | {'total': sum(seconds.values())})
    synthetic.write_table(rows, args.output)


if __name__ == '__main__':
    use_huge_pages()
    run_and_exit(run, sys.argv)
