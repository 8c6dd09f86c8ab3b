"""Features and logits of whole data sets, and the mean feature of each class."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.special import softmax

from xmixup_jax.compute.augment import evaluation_view
from xmixup_jax.compute.evaluation import over_records
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task, create_task
from xmixup_jax.data.pairing import eval_batches
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import short_name
from xmixup_jax.devices import chosen_precision, replicate
from xmixup_jax.errors import DataError
from xmixup_jax.files import Resumable, file_lock, load_arrays
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.parts import linear_classifier
from xmixup_jax.processes import all_gather, is_first
from xmixup_jax.weights.pretrained import Weights

PyTree = Any


def images_of(config: ConfigDict, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Reads all images that can be decoded, as the evaluation sees them.

    Returns:
      (images, labels): float32 [N, S, S, 3], normalised centre crops, and int32 [N].
    """
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
    """Computes the network's outputs for all readable images, on centre crops.

    Returns:
      {'features' float32 [N, D], 'logits' float32 [N, K], 'label' int32 [N]}. With several
      processes the rows are not in the order of the records, but the same in all three.
    """
    rows = jax.device_get(
        list(over_records(task.output_step, config, state, records, title='outputs of'))
    )
    mask = np.concatenate([row['mask'] for row in rows]).astype(bool)
    return {
        key: np.concatenate([row[key] for row in rows])[mask]
        for key in ('features', 'logits', 'label')
    }


def class_means(
    task: Task,
    config: ConfigDict,
    state: TrainState,
    records: Records,
    resumable: Resumable | None = None,
) -> np.ndarray:
    """Computes the mean pooled feature of each class, on centre crops, in evaluation mode.

    Args:
      task: of the backbone.
      config: gives the batch size, and config.match.images_per_class: the number of images used of
        each class, the first ones (0: all).
      state: of the backbone, replicated.
      records: labelled images.
      resumable: saves the sums from time to time, so that an interrupted call can resume.

    Returns:
      float32 [K, D].

    Raises:
      DataError: a class has no readable image.
    """
    num_classes = len(records.class_names)
    limit = config.match.images_per_class
    if limit:
        order = np.argsort(records.labels, kind='stable')
        starts = np.searchsorted(records.labels[order], np.arange(num_classes))
        rank = np.arange(len(order)) - starts[records.labels[order]]
        records = records.select(np.sort(order[rank < limit]))
    sums, counts, done = None, np.zeros(num_classes), 0
    found = None if resumable is None else resumable.load('sums', 'counts', 'done')
    if found is not None:
        sums, counts, done = found[0].astype(float), found[1].astype(float), int(found[2])
    rest = records.select(np.arange(done, len(records)))
    results = over_records(task.output_step, config, state, rest, title='features of')
    # The devices compute one batch while the one before it is added.
    for row, _ in itertools.pairwise(itertools.chain(results, [None])):
        features, label, mask = jax.device_get([row[key] for key in ('features', 'label', 'mask')])
        if sums is None:  # float64: several processes change the order of the rows
            sums = np.zeros((num_classes, features.shape[1]))
        np.add.at(sums, label, features * mask[:, None])
        np.add.at(counts, label, mask)
        done += min(config.eval_batch_size, len(records) - done)
        if resumable is not None and resumable.due:
            resumable.save(sums=sums, counts=counts, done=done)
    check_counts(counts, records)
    assert sums is not None  # each class has an image
    return (sums / counts[:, None]).astype(np.float32)


def plain_network(
    config: ConfigDict, num_logits: int, backbone: Weights | None, *, with_head: bool = False
) -> tuple[Task, TrainState]:
    """Builds the network of a run without any changes by its method.

    Args:
      config: of the experiment.
      num_logits: width of the head.
      backbone: weights; None for random ones.
      with_head: whether the head, too, comes from the weights.

    Returns:
      (task, state), the state replicated over the local devices.
    """
    config = config.copy_and_resolve_references()
    config.method = 'finetune'
    task, state = create_task(config, Sizes(num_logits), backbone)
    if with_head and backbone is not None:
        params, batch_stats = backbone.fill(state.params, state.batch_stats, with_head=True)
        state = replace(state, params=params, batch_stats=batch_stats)
    return task, replicate(state)


def predicted_similarity(
    config: ConfigDict, backbone: Weights, target: Records, source_names: Sequence[str]
) -> np.ndarray:
    """Averages the probabilities of the source classes over the images of each target class.

    The probabilities are those of the pre-trained head; no source image is read.

    Args:
      config: of the experiment.
      backbone: weights with their own head.
      target: labelled images.
      source_names: K_s names; see `Weights.head_columns`.

    Returns:
      float64 [K_t, K_s].

    Raises:
      DataError: the weights have no head, the head does not know a source class, or a target class
        has no readable image.
    """
    columns, head = backbone.head_columns(source_names), backbone.head
    assert head is not None  # `head_columns` raises without one

    def mean_probabilities(resumable: Resumable | None) -> np.ndarray:
        del resumable  # the target is small
        task, state = plain_network(config, len(head['bias']), backbone, with_head=True)
        outputs = outputs_of(task, config, state, target)
        # Several processes change the order of the rows; float64 keeps that from showing in the
        # sums.
        probabilities = softmax(outputs['logits'].astype(np.float64), axis=1)
        one_hot = np.arange(len(target.class_names))[:, None] == outputs['label']
        counts = one_hot.sum(axis=1, keepdims=True)
        check_counts(counts[:, 0], target)
        return (one_hot / counts) @ probabilities

    return _cached(config, backbone, target, 'probabilities', mean_probabilities)[:, columns]


def check_counts(counts: np.ndarray, records: Records) -> None:
    """Raises DataError if a class has no image that can be read: counts [K]."""
    if not counts.all():
        name = records.class_names[np.flatnonzero(counts == 0)[0]]
        raise DataError(
            f'class {name!r} of {records.name} has no readable image, so it cannot be matched'
        )


def backbone_class_means(
    config: ConfigDict, backbone: Weights | None, records: Records
) -> np.ndarray:
    """`class_means` of the network that the run starts from, cached in config.cache_dir.

    Args:
      config: of the experiment.
      backbone: its weights. None for random weights, whose means are not cached.
      records: labelled images.

    Returns:
      float32 [K, D].
    """

    def means(resumable: Resumable | None) -> np.ndarray:
        task, state = plain_network(config, 1, backbone)
        return class_means(task, config, state, records, resumable)

    return _cached(config, backbone, records, 'means', means)


def backbone_classifier(
    config: ConfigDict, backbone: Weights | None, target: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Fits `linear_classifier` to features of the network that the run starts from.

    It sees the centre crops of all readable images, and is cached in config.cache_dir.

    Args:
      config: of the experiment.
      backbone: weights of the network. None for random weights, for which nothing is cached.
      target: labelled images.

    Returns:
      (kernel float32 [D, K], bias float32 [K]).

    Raises:
      DataError: a class has no readable image.
    """

    def rows(resumable: Resumable | None) -> np.ndarray:
        del resumable  # the target is small
        # The width of the head that `backbone_class_means` has: they share their compiled program.
        task, state = plain_network(config, 1, backbone)
        outputs = outputs_of(task, config, state, target)
        names = target.class_names
        return np.vstack(linear_classifier(outputs['features'], outputs['label'], names))

    fitted = _cached(config, backbone, target, 'classifier', rows)
    return fitted[:-1], fitted[-1]


def _cached(
    config: ConfigDict,
    backbone: Weights | None,
    records: Records,
    name: str,
    compute: Callable[[Resumable | None], np.ndarray],
) -> np.ndarray:
    """Returns an array of `records` from config.cache_dir, or computes and saves it.

    Args:
      config, backbone, records: what the array depends on. Without a backbone nothing is cached.
      name: of the array in its file.
      compute: makes it; called with the file to save unfinished sums in, or None.
    """
    if backbone is None:
        return compute(None)
    path = _cache_path(config, backbone, records, name)
    found = load_arrays(path, name)
    everywhere = all_gather(np.array(found is not None)).all()
    if found is not None and everywhere:
        return found[0]
    resumable = Resumable(path)
    if jax.process_count() > 1:  # resuming would need all processes to agree on the position
        found = [compute(None)]
        if is_first():
            resumable.finish(**{name: found[0]})
        return found[0]
    with file_lock(path.with_suffix('.lock'), '--config.cache_dir', wait=True):
        # Another run may have written the array while this one waited for the lock.
        found = load_arrays(path, name)
        if found is None:
            found = [compute(resumable)]
            resumable.finish(**{name: found[0]})
        return found[0]


def _cache_path(config: ConfigDict, backbone: Weights, records: Records, name: str) -> Path:
    """A file name that depends on all that the array does: weights, network, images, precision."""
    key = {
        'weights': backbone.digest,
        'model': config.model.to_dict(),
        'crop': [config.resize, config.image_size, config.match.images_per_class],
        'records': records.identity,
    }
    if config.fit != 'crop':  # earlier versions always cropped, and had no such key
        key['fit'] = config.fit
    if name != 'means':  # likewise
        key['name'] = name
    precision = chosen_precision(config.precision)
    if precision != 'float32':
        key['precision'] = precision
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = f'{short_name(records.name)}-{digest}.npz'
    return Path(config.cache_dir).expanduser() / 'features' / file
