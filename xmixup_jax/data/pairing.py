"""Pairing: every target record meets a record of its matched source classes.

Both data sets are grain `MapDataset`s with random access. Order, pairing and the seeds of the
augmentation follow from (seed, step) alone, whatever the number of processes: step `s` of a run
is the global batch of positions [s * B, (s + 1) * B), and process p of P reads every P-th of
them. The iterator's state is therefore one number and a resumed run is the same run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import Data
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
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.IterDataset:
    """Endless batches of this process's share, reshuffled in every epoch of the target.

    Args:
      data: the target's training records and, with a match, the source's.
      match: the source classes of every target class; None for methods that do not pair.
      seed: of order, pairing and augmentation.
      batch_size: global; the process gets batch_size / process_count records.
      resize: side of the square images in px.
      num_threads: threads that read and decode.
      process_index, process_count: jax's own by default.

    Returns:
      batches of 'image' uint8 [b, R, R, 3], 'label' int32 [b], 'seed' uint32 [b] and, with a
      match, 'source_image' uint8 [b, R, R, 3] and 'source_label' int32 [b], the class's
      position in `match.selected`.
    """
    target, source = data.target, data.source
    if match is not None:
        selected = match.selected
        pools = {c: np.flatnonzero(source.labels == c) for c in selected}

    def draw(i: int, rng: np.random.Generator) -> dict[str, Any]:
        drawn = {'index': i, 'seed': rng.integers(2**32, dtype=np.uint32)}
        if match is not None:
            pool = pools[rng.choice(match.classes[target.labels[i]])]
            drawn['source_index'] = rng.choice(pool)
        return drawn

    def load(drawn: dict[str, Any]) -> Batch:
        i = drawn['index']
        record = {
            'image': target.image_or_next(i, resize),
            'label': target.labels[i],
            'seed': drawn['seed'],
        }
        if match is not None:
            j = drawn['source_index']
            record['source_image'] = source.image_or_next(j, resize)
            label = np.searchsorted(selected, source.labels[j])
            record['source_label'] = label.astype(np.int32)
        return record

    # Drawn before the processes part, so that their number does not change what is drawn.
    drawn = grain.MapDataset.range(len(target)).seed(seed).shuffle().repeat().random_map(draw)
    return _batches(drawn, load, batch_size, num_threads, process_index, process_count)


def eval_batches(
    records: Records,
    *,
    batch_size: int,
    resize: int,
    num_threads: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Every record once, this process's share; masked are the filling of the last batch, and
    records whose image cannot be decoded.

    All processes get the same number of batches, so that collective operations line up.

    Yields:
      'image' uint8 [b, R, R, 3], 'label' int32 [b], 'mask' float32 [b], 0 or 1.
    """
    padded = -(-len(records) // batch_size) * batch_size

    def load(i: int) -> Batch:
        image = records.image(i, resize) if i < len(records) else None
        real = image is not None
        return {
            'image': image if real else np.zeros((resize, resize, 3), np.uint8),
            'label': records.labels[i if real else 0],
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
    """This process's share of `dataset`, loaded by threads and batched."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    share = dataset[process_index::process_count].map(load)
    return share.batch(batch_size // process_count, drop_remainder=True).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4)
    )
