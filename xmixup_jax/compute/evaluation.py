"""What a network makes of a whole set of records, exactly once each."""

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
from xmixup_jax.devices import InFlight, shard


@dataclass(frozen=True)
class Tested:
    """A network's outputs for all records that can be read, in their order."""

    logits: np.ndarray
    """float32 [N, K]."""
    label: np.ndarray
    """int32 [N]."""
    index: np.ndarray
    """int32 [N], places in the records."""

    @cached_property
    def predicted(self) -> np.ndarray:
        """int [N], the most probable classes."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """int [K, K], numbers of images; the rows are the true classes."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.label, self.predicted, labels=range(self.logits.shape[1]))

    @property
    def metrics(self) -> dict[str, float]:
        """'top1' accuracy and 'loss', the mean cross-entropy."""
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
    """Yields `mapped_step(state, batch)`, still on the device, for each batch of the records."""
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
        desc=f'{title} {records.name.split("/")[-1]}',
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
    """The target's logits of all records."""
    rows = jax.device_get(list(over_records(task.eval_step, config, state, records)))
    return collected(rows)


def collected(batches: list[dict[str, np.ndarray]]) -> Tested:
    """Puts the outputs for batches together, in the order of the records.

    Args:
      batches: 'logits' [b, K], and 'label', 'index' and 'mask' as in `pairing.eval_batches`.
    """
    columns = {key: np.concatenate([each[key] for each in batches]) for key in batches[0]}
    order = np.argsort(columns['index'], kind='stable')  # several processes deal them out
    order = order[columns['mask'][order] > 0]
    return Tested(*(columns[key][order] for key in ('logits', 'label', 'index')))
