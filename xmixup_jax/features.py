"""Class features: the mean penultimate feature of every class in the pre-trained backbone."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from xmixup_jax.data.sources import Records
from xmixup_jax.errors import DataError
from xmixup_jax.evaluation import over_records
from xmixup_jax.step import Task, TrainState, feature_step, map_eval_step


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
    results = over_records(step, config, state, records)
    totals = reduce(lambda total, result: jax.tree.map(jnp.add, total, result), results)
    sums, counts = jax.device_get(totals)
    return sums / counts[:, None]
