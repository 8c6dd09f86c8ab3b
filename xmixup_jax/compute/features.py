"""What a network makes of data sets as a whole: outputs of all records, means of all classes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.special import softmax

from xmixup_jax.compute.augment import evaluation_view
from xmixup_jax.compute.evaluation import over_records
from xmixup_jax.compute.mapping import map_eval_step
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task, create_task, evaluated
from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import short_name
from xmixup_jax.devices import replicate
from xmixup_jax.errors import DataError
from xmixup_jax.files import Resumable, file_lock, load_arrays
from xmixup_jax.methods.base import Sizes
from xmixup_jax.processes import all_gather, is_first
from xmixup_jax.weights.pretrained import Weights

PyTree = Any


def images_of(config: ConfigDict, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """All readable images as the evaluation sees them, [N, H, W, 3], and the labels, [N]."""
    batches = eval_batches(
        records,
        batch_size=len(records),
        resize=config.resize,
        fit=config.fit,
        num_threads=config.num_threads,
        process_index=0,
        process_count=1,
    )
    batch = next(batches)
    readable = batch['mask'].astype(bool)
    images = evaluation_view(config, batch['image'][readable])
    return np.asarray(images), batch['label'][readable]


def outputs_of(
    task: Task, config: ConfigDict, state: TrainState, records: Records
) -> dict[str, np.ndarray]:
    """'features' [N, D], 'logits' [N, K] and 'label' [N] of all records, on centre crops.

    The order of the records is not kept over several processes; the three agree.
    """
    rows = jax.device_get(
        list(over_records(task.output_step, config, state, records, title='outputs of'))
    )
    mask = np.concatenate([row['mask'] for row in rows]).astype(bool)
    return {
        key: np.concatenate([row[key] for row in rows])[mask]
        for key in ('features', 'logits', 'label')
    }


def feature_step(task: Task, num_classes: int, state: TrainState, batch: PyTree) -> PyTree:
    """Sums of the penultimate features of each class over a batch of `pairing.eval_batches`.

    Returns:
      (sums float32 [num_classes, D], counts float32 [num_classes]), over all devices.
    """
    outputs = evaluated(task, state, batch)
    one_hot = jax.nn.one_hot(batch['label'], num_classes) * batch['mask'][:, None]
    sums = jnp.einsum('bk,bd->kd', one_hot, outputs.features, precision='highest')
    return jax.lax.psum((sums, one_hot.sum(0)), 'batch')


@lru_cache(maxsize=8)
def _mapped_feature_step(task: Task, num_classes: int):
    return map_eval_step(partial(feature_step, task, num_classes))


def class_means(
    task: Task,
    config: ConfigDict,
    state: TrainState,
    records: Records,
    resumable: Resumable | None = None,
) -> np.ndarray:
    """Mean pooled features of each class, on centre crops, in evaluation mode.

    Args:
      task: of the backbone.
      config: gives batch size and config.match.images_per_class, the number of images of a class
        that count (the first ones; 0 for all).
      state: replicated parameters and statistics of the backbone.
      records: labelled images.
      resumable: keeps the sums of an interrupted call, so that the next one goes on.

    Returns:
      float32 [K, D].

    Raises:
      DataError: a class has no image.
    """
    num_classes = len(records.class_names)
    limit = config.match.images_per_class
    if limit:
        order = np.argsort(records.labels, kind='stable')
        starts = np.searchsorted(records.labels[order], np.arange(num_classes))
        rank = np.arange(len(order)) - starts[records.labels[order]]
        records = records.select(np.sort(order[rank < limit]))
    totals, done = None, 0
    if resumable is not None:
        found = resumable.load('sums', 'counts', 'done')
        if found is not None:
            totals, done = (found[0], found[1]), int(found[2])
    rest = records.select(np.arange(done, len(records)))
    mapped = _mapped_feature_step(task, num_classes)
    for result in over_records(mapped, config, state, rest, title='features of'):
        totals = result if totals is None else jax.tree.map(jnp.add, totals, result)
        done += min(config.eval_batch_size, len(records) - done)
        if resumable is not None and resumable.due:
            sums, counts = jax.device_get(totals)
            resumable.save(sums=sums, counts=counts, done=done)
    sums, counts = jax.device_get(totals)
    _check_counts(counts, records)
    return sums / counts[:, None]


def plain_network(
    config: ConfigDict, num_logits: int, backbone: Weights | None, *, with_head: bool = False
) -> tuple[Task, TrainState]:
    """The network of a run without anything of its method, replicated.

    Args:
      config: of the experiment.
      num_logits: width of the head.
      backbone: weights, None for random ones.
      with_head: whether the head is that of the weights, too.
    """
    config = config.copy_and_resolve_references()
    config.method = 'finetune'
    task, state = create_task(config, Sizes(num_logits))
    if backbone is not None:
        params, batch_stats = backbone.fill(state.params, state.batch_stats, with_head=with_head)
        state = replace(state, params=params, batch_stats=batch_stats)
    return task, replicate(state)


def predicted_similarity(
    config: ConfigDict, backbone: Weights, target: Records, source_names: Sequence[str]
) -> np.ndarray:
    """Mean probability that the pre-trained head gives each source class on a target class.

    No image of the source is read.

    Args:
      config: of the experiment.
      backbone: weights with their own head.
      target: labelled images.
      source_names: K_s names; see `Weights.head_columns`.

    Returns:
      float64 [K_t, K_s].

    Raises:
      DataError: no head, an unknown source class, or a target class without a readable image.
    """
    columns, head = backbone.head_columns(source_names), backbone.head
    assert head is not None  # `head_columns` raises without one
    task, state = plain_network(config, len(head['bias']), backbone, with_head=True)
    outputs = outputs_of(task, config, state, target)
    # float64: in several processes the records come in another order.
    probabilities = softmax(outputs['logits'].astype(np.float64), axis=1)
    one_hot = np.arange(len(target.class_names))[:, None] == outputs['label']
    counts = one_hot.sum(axis=1, keepdims=True)
    _check_counts(counts[:, 0], target)
    return (one_hot / counts) @ probabilities[:, columns]


def _check_counts(counts: np.ndarray, records: Records) -> None:
    if not counts.all():
        name = records.class_names[np.flatnonzero(counts == 0)[0]]
        raise DataError(
            f'class {name!r} of {records.name} has no readable image, so it cannot be matched'
        )


def backbone_class_means(
    config: ConfigDict, backbone: Weights | None, records: Records
) -> np.ndarray:
    """`class_means` in the network that the run starts from; kept in the cache folder.

    Args:
      config: of the experiment.
      backbone: its weights, None for random weights (which are not worth keeping).
      records: labelled images.
    """

    def means(resumable: Resumable | None) -> np.ndarray:
        task, state = plain_network(config, len(records.class_names), backbone)
        return class_means(task, config, state, records, resumable)

    if backbone is None:
        return means(None)
    path = _cache_path(config, backbone, records)
    found = load_arrays(path, 'means')
    everywhere = all_gather(np.array(found is not None)).all()
    if found is not None and everywhere:
        return found[0]
    resumable = Resumable(path)
    if jax.process_count() > 1:  # they would have to agree on where to go on
        found = [means(None)]
        if is_first():
            resumable.finish(means=found[0])
        return found[0]
    with file_lock(path.with_suffix('.lock'), '--config.cache_dir', wait=True):
        # Another run may have written them meanwhile.
        found = load_arrays(path, 'means')
        if found is None:
            found = [means(resumable)]
            resumable.finish(means=found[0])
        return found[0]


def _cache_path(config: ConfigDict, backbone: Weights, records: Records) -> Path:
    """Named by everything that the means depend on: weights, network, crop and records."""
    key = {
        'weights': backbone.digest,
        'model': config.model.to_dict(),
        'crop': [config.resize, config.image_size, config.match.images_per_class],
        'records': records.identity,
    }
    if config.fit != 'crop':  # which earlier versions did without saying so
        key['fit'] = config.fit
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = f'{short_name(records.name)}-{digest}.npz'
    return Path(config.cache_dir).expanduser() / 'features' / name
