"""Re-estimates batch statistics on clean target images before a network is tested.

A method that trains on mixed images leaves moving averages of mixed images, whose variance is
smaller than that of test images. They are replaced by the population statistics of clean training
crops, as in Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (https://arxiv.org/abs/2105.07576),
section 3.
"""

from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute import freezing
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import replicate, shard
from xmixup_jax.methods.find import method_of

PyTree = Any


def reestimates(config: ConfigDict) -> bool:
    """Whether networks of this experiment get new batch statistics before a test."""
    if config.freeze == 'backbone':
        return False
    if config.batch_norm == 'mixed':
        return True
    changed = method_of(config).changes_images
    return config.batch_norm == 'batch' and changed and config.reestimate > 0


def with_clean_statistics(
    task: Task, config: ConfigDict, state: TrainState, target: Records
) -> TrainState:
    """Re-estimates the batch statistics where `reestimates(config)`.

    The first config.reestimate training batches of the run are used again, with the same crops and
    flips but without mixing. A resumed run gets the same statistics.

    Args:
      task: of the run.
      config: of the experiment.
      state: replicated, after training.
      target: the training records.

    Returns:
      the state to test, save and predict with. Its `batch_stats` are the population statistics;
      with config.batch_norm=mixed, their mean with the pre-trained ones. Without re-estimation it
      is `state` itself.
    """
    if not reestimates(config) or not jax.tree.leaves(state.batch_stats):
        return state
    batches = train_batches(
        Data(target, None, None),
        None,
        seed=config.seed,
        batch_size=config.batch_size,
        resize=config.resize,
        fit=config.fit,
        num_threads=config.num_threads,
        balanced=config.balance.sampling == 'balanced',
    )
    moments = [
        jax.device_get(task.moments_step(state, shard(batch)))
        for batch in islice(iter(batches), config.reestimate)
    ]
    statistics = population(moments)
    if config.batch_norm == 'mixed':
        statistics = jax.tree.map(
            lambda new, old: (new + np.asarray(old)) / 2, statistics, state.batch_stats
        )
    if task.frozen is not None:
        statistics = freezing.restore_frozen(statistics, state.batch_stats, task.frozen)
    return replace(state, batch_stats=replicate(statistics))


def population(moments: list[PyTree]) -> PyTree:
    """Combines the means and variances of equally large batches.

    Args:
      moments: for each batch, nested dicts whose innermost dicts hold 'mean' and 'var', [C] each.

    Returns:
      the same structure, float32: mean = E[mean], var = E[var + mean^2] - E[mean]^2.

    >>> parts = [{'bn1': {'mean': np.array([m]), 'var': np.array([1.0])}} for m in (0.0, 2.0)]
    >>> population(parts)['bn1']['mean'].tolist(), population(parts)['bn1']['var'].tolist()
    ([1.0], [2.0])
    """

    def combine(*layers):
        means, variances = (
            np.stack([np.asarray(layer[key], np.float64) for layer in layers])
            for key in ('mean', 'var')
        )
        mean = means.mean(0)
        var = np.maximum((variances + means**2).mean(0) - mean**2, 0)
        return {'mean': mean.astype(np.float32), 'var': var.astype(np.float32)}

    return jax.tree.map(combine, *moments, is_leaf=lambda node: 'var' in node)
