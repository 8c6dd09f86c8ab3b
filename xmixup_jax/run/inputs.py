"""The inputs of a run: checks that data and weights are available, and opens the batches."""

from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.step import Task
from xmixup_jax.data.cache import choose_cache, used_records, with_caches
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.pool import fill_pool
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import (
    Data,
    Opened,
    split_validation,
    train_and_test,
    train_records,
)
from xmixup_jax.data.sources import problem
from xmixup_jax.devices import shard
from xmixup_jax.errors import DataError, raise_all
from xmixup_jax.matching import ClassMatch, check_assignment
from xmixup_jax.methods.find import method_of, options_of
from xmixup_jax.processes import every_process
from xmixup_jax.weights.find import find_weights

PyTree = Any


def uses_source(config: ConfigDict) -> bool:
    """Whether the method reads the source's records."""
    method = method_of(config)
    return method.pairs or method.reads_source(options_of(config))


def data_sets(config: ConfigDict) -> dict[str, str]:
    """Returns the names of the data sets that the run reads, by 'target' and 'source'."""
    names = {'target': config.target.name}
    if uses_source(config) or config.weights == 'source':
        names['source'] = config.source.name
    return names


@every_process
def check_inputs(config: ConfigDict) -> None:
    """Checks that the data sets and weights of a run are available.

    Raises:
      DataError: something is missing; lists everything in one message.
    """
    names = data_sets(config)
    missing = {f'config.{key}.name': problem(name, config) for key, name in names.items()}
    if config.weights not in ('', 'source'):
        try:
            find_weights(config.weights)
        except DataError as error:
            missing['config.weights'] = str(error)
    raise_all(missing)


@every_process
def open_data(config: ConfigDict, opened: Opened | None = None) -> Data:
    """Opens the records of the run, and checks that there are enough classes to match.

    Args:
      config: configuration of the run.
      opened: splits opened by earlier runs, to share them; see `selection.open_split`.

    Raises:
      UserError: the data cannot be opened, or the classes cannot be matched.
    """
    target, test = train_and_test(config.target, config, opened)
    target, validation = split_validation(target, config.target, config)
    if not uses_source(config):
        return Data(target, test, None, validation)
    source = train_records(config.source, config, opened)
    if method_of(config).pairs:
        check_assignment(
            config.match.assignment,
            len(target.class_names),
            len(source.class_names),
            config.match.classes_per_target,
        )
    return Data(target, test, source, validation)


@every_process
def source_data(config: ConfigDict, pretrain: ConfigDict, source: Records | None) -> Data:
    """Opens the records for pre-training on the source, with config.weights=source.

    Args:
      config: configuration of the run.
      pretrain: configuration of the pre-training; see `config.pretrain_config`.
      source: the run's source records, if it has any. If they are the caller's own, not those of
        the configuration, the pre-training has no test.
    """
    opened: Opened = {}
    if source is not None and not _is_configured(source, config, opened):
        return Data(source, None, None)
    target, test = train_and_test(pretrain.target, pretrain, opened)
    target, validation = split_validation(target, pretrain.target, pretrain)
    return Data(target, test, None, validation)


def _is_configured(source: Records, config: ConfigDict, opened: Opened) -> bool:
    try:
        return train_records(config.source, config, opened).identity == source.identity
    except DataError:  # the configuration may not name a source at all
        return False


class Inputs(NamedTuple):
    """Everything that a run reads during training."""

    batches: grain.IterDataset
    """This process's batches; see `pairing.train_batches`."""
    pool: dict[str, jax.Array]
    """Decoded images on the devices; see `pool.fill_pool`. {} if they are not kept there."""
    data: Data
    """The records, with their caches; see `cache.with_caches`."""


def open_input(config: ConfigDict, data: Data, match: ClassMatch | None) -> Inputs:
    """Opens the training batches, and chooses where to cache the decoded images."""
    used = used_records(data, match)
    tested = [data.held_out] if data.held_out is not None and config.eval_every else []
    kind = every_process(choose_cache)(config, [*used.values(), *tested])
    data = every_process(with_caches)(config, kind, data, match)
    batches = _batches(config, data, match, config.num_threads, positions=kind == 'device')
    return Inputs(batches, fill_pool(config, used) if kind == 'device' else {}, data)


def first_inputs(
    task: Task, constants: PyTree, config: ConfigDict, data: Data, match: ClassMatch | None
) -> dict[str, np.ndarray]:
    """Returns the network's inputs in the first step: `step.input_step` of the first batch."""
    batches = _batches(config, data, match, num_threads=1, positions=False)
    return jax.device_get(task.input_step(constants, shard(next(iter(batches)))))


def _batches(
    config: ConfigDict, data: Data, match: ClassMatch | None, num_threads: int, positions: bool
) -> grain.IterDataset:
    return train_batches(
        data,
        match,
        seed=config.seed,
        batch_size=config.batch_size,
        resize=config.resize,
        fit=config.fit,
        num_threads=num_threads,
        positions=positions,
        balanced=config.balance.sampling == 'balanced',
    )
