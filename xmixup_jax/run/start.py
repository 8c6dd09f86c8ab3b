"""The start of a run: the network, the class match and the method's preparatory phase."""

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.features import (
    backbone_class_means,
    backbone_classifier,
    check_counts,
    images_of,
    outputs_of,
    predicted_similarity,
)
from xmixup_jax.compute.state import TrainState, with_average
from xmixup_jax.config import choose_method, is_probe
from xmixup_jax.data.balance import CLASS_WEIGHTS, class_weights
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data, train_and_test
from xmixup_jax.devices import on_host, replicate
from xmixup_jax.errors import ConfigError
from xmixup_jax.files import MATCH, write_json
from xmixup_jax.matching import ClassMatch, assign, class_similarity
from xmixup_jax.methods.base import Setup, Sizes
from xmixup_jax.methods.find import method_name, method_of, options_of, with_traced
from xmixup_jax.methods.parts import with_linear_head
from xmixup_jax.models import MODELS
from xmixup_jax.optimizer import set_peak
from xmixup_jax.processes import first_process
from xmixup_jax.run.checkpoint import Checkpoints, Meta
from xmixup_jax.weights.find import find_weights
from xmixup_jax.weights.pretrained import Weights

PyTree = Any

log = logging.getLogger('xmixup_jax')


class Start(NamedTuple):
    """The point from which a run starts or resumes."""

    task: step_lib.Task
    state: TrainState
    """Replicated."""
    constants: PyTree
    """The method's constants, replicated."""
    meta: Meta
    """Metadata of the checkpoint, or of one that would be written now."""


def resume(config: ConfigDict, checkpoints: Checkpoints) -> Start | None:
    """Resumes from the newest readable checkpoint; None if there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none can be used.
    """
    meta = checkpoints.restore_meta()
    if meta is None:
        return None
    task = step_lib.make_task(config, meta.sizes)
    restored = checkpoints.restore(task.shapes)
    if restored is None:
        return None
    state, meta = restored
    # With config.allow_changes the learning rate may have changed.
    peak = replicate(np.float32(config.optimizer.learning_rate))
    state = replace(state, opt_state=set_peak(state.opt_state, peak))
    constants = with_traced(checkpoints.restore_constants(meta), config)
    return Start(task, state, replicate(constants), meta)


def begin(
    config: ConfigDict, data: Data, backbone: Weights | None, checkpoints: Checkpoints, train
) -> Start:
    """Starts from pre-trained weights, with the method's preparatory phase.

    Args:
      config: configuration of the run.
      data: records of the run.
      backbone: the pre-trained weights; None: random ones.
      checkpoints: the run's checkpoints; the method's constants are saved there.
      train: called with (config, name, data) by preparatory phases that train a network; makes a
        run in the sub-folder `name` and returns its result.

    Raises:
      ConfigError: the method needs a pre-trained head or a source test split that is missing.
    """
    begun = time.perf_counter()
    method, options = method_of(config), options_of(config)
    match = find_match(config, backbone, data) if method.pairs else None
    head = None if backbone is None else backbone.head
    sizes = Sizes(
        target=len(data.target.class_names),
        source=0 if match is None else len(match.selected),
        pretrained=0 if head is None else len(head['bias']),
    )
    if method.needs_head(options) and not sizes.pretrained:
        name = MODELS[config.model.name].head
        raise ConfigError(
            f'config.method={config.method} needs the head of the pre-trained network, but '
            f'config.weights={config.weights!r} has none ({name}.weight): use weights with a head, '
            'or config.weights=source'
        )
    task, initial = step_lib.create_task(config, sizes, backbone)
    initial = jax.tree.map(np.asarray, initial)
    earlier_seconds = 0.0

    def source_columns() -> np.ndarray:
        # Only called by methods that pair and use the pre-trained head.
        assert backbone is not None and data.source is not None and match is not None
        return backbone.head_columns([data.source.class_names[c] for c in match.selected])

    def source_test() -> Records:
        if not config.source.test_split:
            raise ConfigError(
                f'config.method={config.method} needs a split of the source that its network was '
                'not trained on: name one with --config.source.test_split, or for Co-Tuning use '
                '--config.cotuning.temperature=1'
            )
        _, test = train_and_test(config.source, config)
        assert backbone is not None and test is not None  # the method needs a head
        return replace(test, labels=backbone.head_columns(test.class_names)[test.labels])

    def train_on(auxiliary: ConfigDict, records: Records, name: str) -> tuple[PyTree, PyTree]:
        nonlocal earlier_seconds
        begun = time.perf_counter()
        choose_method(auxiliary, 'finetune')
        auxiliary.wandb, auxiliary.warm_head = '', False
        auxiliary.ema_decay, auxiliary.patience = 0.0, 0
        auxiliary.balance.sampling, auxiliary.balance.weights = 'natural', 'none'
        auxiliary.target = config.source.copy_and_resolve_references()
        auxiliary.weights = '' if backbone is None else str(backbone.path)
        result = train(auxiliary, name, Data(records, None, None))
        # Adds only the time spent by earlier, interrupted processes.
        earlier_seconds += result['seconds'] - (time.perf_counter() - begun)
        weights = Weights(find_weights(str(checkpoints.workdir / name)), config.model.name)
        return weights.fill(initial.params, initial.batch_stats)

    setup = Setup(
        name=method_name(config.method),
        options=options,
        config=config,
        sizes=sizes,
        state=initial,
        head=head,
        target=data.target,
        source=data.source,
        match=match,
        network=partial(step_lib.network, task.graphdef),
        images=partial(images_of, config),
        outputs=lambda state, records: outputs_of(task, config, replicate(state), records),
        classifier=partial(backbone_classifier, config, backbone, data.target),
        class_means=partial(backbone_class_means, config, backbone),
        source_columns=source_columns,
        source_test=source_test,
        train=train_on,
    )
    if is_probe(config):
        log.info(
            'Linear probe: fits the head to the features of %d images; config.steps, '
            'config.optimizer and random crops are ignored',
            len(data.target),
        )
    if backbone is not None and (config.warm_head or is_probe(config)):
        setup = setup._replace(state=with_linear_head(setup))
    state, constants = method.prepare(setup)
    # Initialise the optimiser with the parameters after the preparatory phase.
    with on_host():
        state = replace(state, opt_state=task.optimizer(with_traced({}, config)).init(state.params))
    state = step_lib.with_peak(state, config)
    if config.ema_decay:
        state = with_average(state)
    if config.balance.weights != 'none':
        law, beta = config.balance.weights, config.balance.beta
        weights = class_weights(data.target.labels, sizes.target, law, beta)
        constants = constants | {CLASS_WEIGHTS: weights}
    meta = Meta(
        config=config.to_dict(),
        iterator=None,
        match=match,
        sizes=sizes,
        seconds=max(0.0, earlier_seconds) + time.perf_counter() - begun,
        rows=[],
        constants=checkpoints.save_constants(constants),
        data=data.summary(),
    )
    constants = with_traced(constants, config)
    return Start(task, replicate(state), replicate(constants), meta)


def find_match(config: ConfigDict, backbone: Weights | None, data: Data) -> ClassMatch:
    """Matches target and source classes as config.match says.

    Classes are compared by their mean features in the pre-trained backbone, or by the predictions
    of its head.
    """
    options, source = config.match, data.source
    assert source is not None  # the method pairs
    if options.similarity == 'predicted':
        assert backbone is not None  # `checks.validate` checks it
        check_counts(np.bincount(source.labels, minlength=len(source.class_names)), source)
        similarity = predicted_similarity(config, backbone, data.target, source.class_names)
    else:
        means = partial(backbone_class_means, config, backbone)
        similarity = class_similarity(means(data.target), means(source), options.similarity)
    return assign(similarity, options.assignment, options.classes_per_target, config.seed)


def report_match(workdir: Path, match: ClassMatch, data: Data) -> list[dict[str, Any]]:
    """Writes match.json: each target class with its source classes and their similarities.

    Returns:
      the content: rows with 'target', its 'source' classes and their 'similarity'.
    """
    assert data.source is not None  # as there is a match
    rows = [
        {
            'target': data.target.class_names[i],
            'source': [data.source.class_names[c] for c in classes],
            'similarity': [round(float(s), 6) for s in similarity],
        }
        for i, (classes, similarity) in enumerate(zip(match.classes, match.similarity, strict=True))
    ]
    first_process(write_json)(workdir / MATCH, rows)
    return rows
