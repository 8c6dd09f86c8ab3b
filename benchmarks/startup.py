"""Measures the time to the first pairs, by the number of source records:

    python -m benchmarks.startup --records=1000,10000,100000,1000000,10000000

The source is synthetic. It has 1,000 classes; 100 of them are matched. The columns are times:
`labels`, to read every record's label from its serialised example; `cached`, to load the labels
from the cache file that this writes; `open`, for everything else before the first pair; `draw`, to
draw one more pair of positions.

  --records  numbers of source records (default: as above)
  --output   CSV file to write
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from benchmarks import synthetic
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.data.cache import used_records
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.selection import Data
from xmixup_jax.data.sources.tfds import split_labels
from xmixup_jax.matching import ClassMatch

CLASSES, MATCHED = 1000, 100
DRAWS = 20_000


class Examples:
    """Serialised examples with one label each, like those of an array_record data source."""

    def __init__(self, features: tfds.features.FeaturesDict, count: int):
        self._of_class = [features.serialize_example({'label': c}) for c in range(CLASSES)]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, places):
        return [self._of_class[place % CLASSES] for place in places]


def measure(count: int, folder: Path) -> dict[str, float]:
    features = tfds.features.FeaturesDict({'label': tfds.features.ClassLabel(num_classes=CLASSES)})
    examples = Examples(features, count)
    seconds = {'records': count}
    for step in ('labels s', 'cached s'):
        begun = time.perf_counter()
        labels = split_labels(
            examples,
            lambda raw: features.deserialize_example_np(raw)['label'],
            folder / f'{count}.npz',
            'synthetic',
        )
        seconds[step] = time.perf_counter() - begun
    assert np.array_equal(labels, np.arange(count) % CLASSES)

    begun = time.perf_counter()
    source = synthetic.records('source', CLASSES, [b''], count)
    target = synthetic.records('target', MATCHED, [b''], 10 * MATCHED)
    match = ClassMatch(np.arange(MATCHED, dtype=np.int32)[:, None], np.ones((MATCHED, 1)))
    data = Data(target, None, source)
    used_records(data, match)
    batches = iter(
        train_batches(data, match, seed=0, batch_size=100, resize=8, num_threads=1, positions=True)
    )
    next(batches)
    seconds['open s'] = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(DRAWS // 100):
        next(batches)
    seconds['draw us'] = 1e6 * (time.perf_counter() - begun) / DRAWS
    seconds['labels us a record'] = 1e6 * seconds['labels s'] / count
    return seconds


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='startup', add_help=False)
    parser.add_argument('--records', default='1000,10000,100000,1000000,10000000')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args(argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(int(count), Path(folder)) for count in args.records.split(',')]
    synthetic.write_table(rows, args.output)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
