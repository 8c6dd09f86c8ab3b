"""Class features: the mean penultimate feature of every class in the pre-trained backbone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.sources import Records
from xmixup_jax.errors import DataError
from xmixup_jax.step import Task, TrainState, feature_step, map_eval_step, shard, wait_if_simulated


def class_means(task: Task, state: TrainState, records: Records) -> np.ndarray:
    """Mean pooled features of each class, on centre crops, in evaluation mode.

    Args:
      task: its config gives image_size, batch size and config.match.images_per_class, the
        number of images of a class that count (the first ones; 0 for all).
      state: replicated parameters and statistics of the backbone.
      records: labelled images.

    Returns:
      float32 [K, D].

    Raises:
      DataError: a class has no image.
    """
    config, num_classes = task.config, len(records.class_names)
    limit = config.match.images_per_class
    if limit:
        order = np.argsort(records.labels, kind='stable')
        starts = np.searchsorted(records.labels[order], np.arange(num_classes))
        rank = np.arange(len(order)) - starts[records.labels[order]]
        records = records.select(np.sort(order[rank < limit]))
    empty = np.setdiff1d(np.arange(num_classes), records.labels)
    if len(empty):
        name = records.class_names[empty[0]]
        raise DataError(f'class {name!r} of {records.name} has no image, so it cannot be matched')
    step = map_eval_step(partial(feature_step, task, num_classes))
    totals = None
    for batch in eval_batches(
        records,
        batch_size=config.eval_batch_size,
        resize=config.resize,
        num_threads=config.num_threads,
    ):
        result = step(state, shard(batch))
        wait_if_simulated(result)
        totals = result if totals is None else jax.tree.map(jnp.add, totals, result)
    sums, counts = jax.device_get(totals)
    return sums / counts[:, None]
