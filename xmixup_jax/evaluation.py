"""What a network makes of a whole set of records, exactly once each."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.records import Records
from xmixup_jax.devices import InFlight, shard
from xmixup_jax.step import Task, TrainState


def over_records(
    mapped_step: Callable[[TrainState, Any], Any],
    config: ConfigDict,
    state: TrainState,
    records: Records,
) -> Iterator[Any]:
    """Yields `mapped_step(state, batch)`, still on the device, for each batch of the records."""
    in_flight = InFlight()
    for batch in eval_batches(
        records,
        batch_size=config.eval_batch_size,
        resize=config.resize,
        num_threads=config.num_threads,
    ):
        result = mapped_step(state, shard(batch))
        in_flight.add(result)
        yield result


def evaluate(
    task: Task, config: ConfigDict, state: TrainState, records: Records
) -> dict[str, float]:
    """Top-1 accuracy and mean cross-entropy over all records."""
    rows = jax.device_get(list(over_records(task.eval_step, config, state, records)))
    loss, correct, count = (
        sum(float(row[key]) for row in rows) for key in ('loss', 'correct', 'count')
    )
    return {'top1': correct / count, 'loss': loss / count}
