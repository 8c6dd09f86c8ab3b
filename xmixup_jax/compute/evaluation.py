"""What a network makes of a whole set of records, exactly once each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.special import log_softmax
from tqdm import tqdm

from xmixup_jax.compute.step import Task, TrainState
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

    @property
    def metrics(self) -> dict[str, float]:
        """'top1' accuracy and 'loss', the mean cross-entropy."""
        log_p = log_softmax(self.logits.astype(np.float64), axis=1)
        return {
            'top1': float(np.mean(self.logits.argmax(axis=1) == self.label)),
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
        records, batch_size=size, resize=config.resize, num_threads=config.num_threads
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
    columns = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    order = np.argsort(columns['index'], kind='stable')  # several processes deal them out
    order = order[columns['mask'][order] > 0]
    return Tested(*(columns[key][order] for key in ('logits', 'label', 'index')))
