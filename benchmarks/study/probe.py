"""The linear probe: logistic regression on the frozen features of centre crops."""

import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.features import outputs_of, plain_network
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import Task
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import replicate
from xmixup_jax.methods.parts import linear_classifier
from xmixup_jax.run.provenance import commit
from xmixup_jax.run.train import backbone_weights


def probe(config: ConfigDict, data: Data) -> dict[str, Any]:
    """Fits and tests the probe.

    Args:
      config: of a run of `finetune`; gives the network, its weights and the crops.
      data: the records of the run.

    Returns:
      the entries of a run's result that a probe has, and 'train_top1'. 'seconds' does not include
      the test, and 'first_step_seconds' of it were spent compiling.
    """
    begun = time.perf_counter()
    task, state = pretrained(config)
    compiling = time.perf_counter()
    outputs_of(task, config, state, data.target.select(np.arange(1)))
    compiled = time.perf_counter()
    found = fit(task, config, state, data)
    return found | {
        'steps': 0,
        'seconds': round(found['fitted'] - begun, 2),
        'first_step_seconds': round(compiled - compiling, 3),
        'train_images': len(data.target),
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'commit': commit(),
    }


def pretrained(config: ConfigDict) -> tuple[Task, TrainState]:
    """The pre-trained network without a method, replicated; its head is not used."""
    config = config.copy_and_resolve_references()
    config.method = 'finetune'
    return plain_network(config, 1, backbone_weights(config))


def fit(task: Task, config: ConfigDict, state: TrainState, data: Data) -> dict[str, Any]:
    """Fits a logistic regression to a network's features of the training images, and tests it.

    Returns:
      'top1', 'train_top1', 'test_images', and 'fitted', the time at which the test began.
    """
    state = replicate(state)
    train = outputs_of(task, config, state, data.target)
    kernel, bias = linear_classifier(train['features'], train['label'], data.target.class_names)
    fitted = time.perf_counter()
    test = outputs_of(task, config, state, data.test)

    def top1(outputs: dict[str, np.ndarray]) -> float:
        predicted = (outputs['features'] @ kernel + bias).argmax(axis=1)
        return float(np.mean(predicted == outputs['label']))

    return {
        'top1': top1(test),
        'train_top1': top1(train),
        'test_images': len(test['label']),
        'fitted': fitted,
    }
