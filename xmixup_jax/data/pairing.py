"""Pairs every target record with a record of its matched source classes, and makes batches.

Both data sets are grain `MapDataset`s with random access. Order, pairs and augmentation seeds
depend on (seed, step) alone, whatever the number of processes: step `s` reads the global batch of
positions [s * B, (s + 1) * B), and process p of P reads the p-th part of each batch. The iterator's
state is therefore a single number, a resumed run equals an uninterrupted one, and the devices of
all processes together always hold one batch in order.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.matching import ClassMatch

Batch = dict[str, np.ndarray]


def train_batches(
    data: Data,
    match: ClassMatch | None,
    *,
    seed: int,
    batch_size: int,
    resize: int,
    num_threads: int,
    fit: str = 'crop',
    process_index: int | None = None,
    process_count: int | None = None,
    positions: bool = False,
    balanced: bool = False,
) -> grain.IterDataset:
    """Makes this process's share of endless training batches, reshuffled every target epoch.

    Args:
      data: the target's training records and, with a match, the source's.
      match: the source classes of every target class; None for methods that do not pair.
      seed: seed of order, pairs and augmentation.
      batch_size: global batch size; this process gets batch_size / process_count records.
      resize: side R of the square images in px.
      num_threads: threads that read and decode; 0: one per core.
      fit: how images are made square, one of `decode.FITS`.
      process_index, process_count: JAX's own by default.
      positions: replace 'image' and 'source_image' by their int32 positions in the records of
        `cache.used_records`, for images that are already on the devices.
      balanced: draw all classes equally often; see `pair_records`.

    Returns:
      batches of 'image' uint8 [b, R, R, 3], 'label' int32 [b], 'seed' uint32 [b] and, with a
      match, 'source_image' uint8 [b, R, R, 3] and 'source_label' int32 [b], the class's
      position in `match.selected`.
    """
    target, source_labels = data.target, None
    if match is not None:
        assert data.source is not None  # as there is a match
        source, source_labels = data.source, data.source.labels
        # Positions in `cache.used_records`, which holds the records of the selected classes.
        place = np.cumsum(np.isin(source_labels, match.selected)) - 1

    def load(drawn: dict[str, Any]) -> Batch:
        i = drawn['target']
        image = np.int32(i) if positions else target.image_or_next(i, resize, fit)
        record = {'image': image, 'label': target.labels[i], 'seed': drawn['seed']}
        if match is not None:
            j = drawn['source']
            image = np.int32(place[j]) if positions else source.image_or_next(j, resize, fit)
            record |= {'source_image': image, 'source_label': drawn['source_label']}
        return record

    # Draw before dividing among the processes: their number must not change the draw.
    drawn = pair_records(target.labels, source_labels, match, seed, balanced)
    return _batches(drawn, load, batch_size, num_threads, process_index, process_count)


def pair_records(
    labels: np.ndarray,
    source_labels: np.ndarray | None,
    match: ClassMatch | None,
    seed: int,
    balanced: bool = False,
) -> grain.MapDataset:
    """Pairs each target record with a random record of its matched source classes.

    Endless, with random access: an epoch contains each target record once, in a new order. Each
    element depends on (seed, position) alone.

    Args:
      labels: labels of the target's records, int [N].
      source_labels: labels of the source's records, int [M].
      match: the source classes of every target class; None: no pairs.
      seed: seed of order and pairs.
      balanced: draw target records with replacement instead: first a class, all with the same
        probability, then one of its records, as PyTorch's `WeightedRandomSampler` with weights
        1 / n does.

    Returns:
      elements with 'target', an index into `labels`; 'seed', uint32, of the record's augmentation;
      and with a match 'source', an index into `source_labels`, and 'source_label', int32, the
      position of its class in `match.selected`.

    >>> from xmixup_jax import match_classes
    >>> match = match_classes(np.eye(2), np.eye(2)[::-1])  # source classes 0 and 1 are swapped
    >>> pairs = pair_records(np.array([0, 1, 1]), np.array([1, 0]), match, seed=0)
    >>> epoch = [pairs[i] for i in range(3)]
    >>> sorted((int(each['target']), int(each['source'])) for each in epoch)
    [(0, 0), (1, 1), (2, 1)]
    """
    if match is not None:
        assert source_labels is not None
        selected = match.selected
        number = np.full(max(selected.max(), source_labels.max()) + 1, -1, np.int32)
        number[selected] = np.arange(len(selected), dtype=np.int32)
        numbers = number[source_labels]
        by_class = np.argsort(numbers, kind='stable')
        places = numbers[by_class], range(len(selected))
        starts, ends = (np.searchsorted(*places, side) for side in ('left', 'right'))
        classes = number[match.classes]

    places_of = [np.flatnonzero(labels == c) for c in np.unique(labels)] if balanced else []

    def draw(i: int, rng: np.random.Generator) -> dict[str, Any]:
        if balanced:
            i = rng.choice(places_of[rng.integers(len(places_of))])
        drawn = {'target': i, 'seed': rng.integers(2**32, dtype=np.uint32)}
        if match is not None:
            candidates = classes[labels[i]]
            c = candidates[rng.integers(len(candidates))]
            j = by_class[starts[c] + rng.integers(ends[c] - starts[c])]
            drawn |= {'source': j, 'source_label': c}
        return drawn

    return grain.MapDataset.range(len(labels)).seed(seed).shuffle().repeat().random_map(draw)


def eval_batches(
    records: Records,
    *,
    batch_size: int,
    resize: int,
    num_threads: int,
    fit: str = 'crop',
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Yields this process's share of batches that contain every record once.

    The last batch is padded. The padding, and records whose image cannot be decoded, are masked.
    All processes get the same number of batches, so that collective operations line up.

    Args:
      records: N records.
      batch_size: global batch size; this process gets b = batch_size / process_count records.
      resize: side R of the square images in px.
      num_threads: threads that read and decode; 0: one per core.
      fit: how images are made square, one of `decode.FITS`.
      process_index, process_count: JAX's own by default.

    Yields:
      'image' uint8 [b, R, R, 3], 'label' int32 [b], 'index' int32 [b], the position in `records`,
      and 'mask' float32 [b], 0 or 1.
    """
    padded = -(-len(records) // batch_size) * batch_size

    def load(i: int) -> Batch:
        image = records.image(i, resize, fit) if i < len(records) else None
        real = image is not None
        return {
            'image': image if real else np.zeros((resize, resize, 3), np.uint8),
            'label': records.labels[i if real else 0],
            'index': np.int32(i),
            'mask': np.float32(real),
        }

    places = grain.MapDataset.range(padded)
    return iter(_batches(places, load, batch_size, num_threads, process_index, process_count))


def _batches(
    dataset: grain.MapDataset,
    load: Callable[[Any], Batch],
    batch_size: int,
    num_threads: int,
    process_index: int | None,
    process_count: int | None,
) -> grain.IterDataset:
    """Loads this process's share of `dataset` with threads, and makes batches."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    share = _Share(dataset, batch_size // process_count, process_index, process_count).map(load)
    num_threads = worker_threads(num_threads)
    # Each thread makes whole batches; with a smaller buffer, some threads would have to wait.
    return share.batch(batch_size // process_count, drop_remainder=True).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    )


class _Share(grain.MapDataset):
    """The `index`-th block of `size` elements out of each `size * count` consecutive ones."""

    def __init__(self, parent: grain.MapDataset, size: int, index: int, count: int):
        super().__init__(parent)
        self._size, self._index, self._count = size, index, count

    def __len__(self) -> int:
        return len(self._parent) // self._count

    def __getitem__(self, place):
        batch, within = divmod(place, self._size)
        return self._parent[(batch * self._count + self._index) * self._size + within]


def worker_threads(num_threads: int) -> int:
    """Resolves config.num_threads: 0 means one thread per core."""
    return num_threads or usable_cores()


def usable_cores() -> int:
    """Counts the cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
