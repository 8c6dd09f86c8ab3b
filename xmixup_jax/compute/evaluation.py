"""Evaluates a network on a whole data set, each image exactly once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.special import log_softmax
from tqdm import tqdm

from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task
from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import short_name
from xmixup_jax.devices import InFlight, shard


@dataclass(frozen=True)
class Tested:
    """A network's outputs for all readable images, in the order of the records."""

    logits: np.ndarray
    """float32 [N, K]."""
    label: np.ndarray
    """int32 [N]."""
    index: np.ndarray
    """int32 [N], positions in the records."""

    @cached_property
    def predicted(self) -> np.ndarray:
        """int [N], the most probable classes."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """int [K, K], the confusion matrix in images; rows are the true classes."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.label, self.predicted, labels=range(self.logits.shape[1]))

    @property
    def metrics(self) -> dict[str, float]:
        """'top1', the accuracy from 0 to 1, and 'loss', the mean cross-entropy in nats."""
        log_p = log_softmax(self.logits.astype(np.float64), axis=1)
        return {
            'top1': float(np.mean(self.predicted == self.label)),
            'loss': float(-log_p[np.arange(len(log_p)), self.label].mean()),
        }


def over_records(
    mapped_step: Callable[[TrainState, Any], Any],
    config: ConfigDict,
    state: TrainState,
    records: Records,
    title: str = 'test',
) -> Iterator[Any]:
    """Yields `mapped_step(state, batch)` for each batch of the records.

    Args:
      mapped_step: maps (state, batch) over the devices, see `mapping.map_eval_step`.
      config: gives batch size, resizing and number of threads.
      state: replicated.
      records: to evaluate.
      title: of the progress bar, before the name of the records.

    Yields:
      the results in order, still on the device.
    """
    in_flight = InFlight()
    size, total = config.eval_batch_size, len(records)
    batches = eval_batches(
        records,
        batch_size=size,
        resize=config.resize,
        fit=config.fit,
        num_threads=config.num_threads,
    )
    with tqdm(
        total=total,
        desc=f'{title} {short_name(records.name)}',
        unit='image',
        disable=None if total > size else True,
        leave=False,
    ) as bar:
        for batch in batches:
            result = mapped_step(state, shard(batch))
            in_flight.add(result)
            yield result
            bar.update(min(size, total - bar.n))


def evaluate(task: Task, config: ConfigDict, state: TrainState, records: Records) -> Tested:
    """Computes the target logits of all records."""
    rows = jax.device_get(list(over_records(task.eval_step, config, state, records)))
    return collect(rows)


def collect(batches: list[dict[str, np.ndarray]]) -> Tested:
    """Joins the outputs of all batches, in the order of the records.

    Args:
      batches: 'logits' [b, K], and 'label', 'index' and 'mask' as in `pairing.eval_batches`.
    """
    columns = {key: np.concatenate([each[key] for each in batches]) for key in batches[0]}
    order = np.argsort(columns['index'], kind='stable')  # several processes interleave them
    order = order[columns['mask'][order] > 0]
    return Tested(*(columns[key][order] for key in ('logits', 'label', 'index')))
