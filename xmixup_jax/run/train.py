"""A run from top to bottom: inputs, start, training, test, result."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.compute.reestimation import with_clean_statistics
from xmixup_jax.compute.state import TrainState, averaged
from xmixup_jax.compute.step import Task
from xmixup_jax.data.records import Records
from xmixup_jax.data.selection import Data
from xmixup_jax.data.sources import short_name
from xmixup_jax.errors import DataError
from xmixup_jax.files import AVERAGE, BEST, ENVIRONMENT, RESULT, set_aside
from xmixup_jax.processes import every_process, first_process
from xmixup_jax.report.scores import scores
from xmixup_jax.run.best import Best
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.data_identity import data_digest, same_data
from xmixup_jax.run.inputs import check_inputs, open_input, source_data
from xmixup_jax.run.loop import fit
from xmixup_jax.run.outcome import chosen_network, summary, test, write_outcome
from xmixup_jax.run.provenance import record
from xmixup_jax.run.start import begin, report_match, resume
from xmixup_jax.run.tracking import tracked
from xmixup_jax.run.workdir import claim, has_result, locked
from xmixup_jax.weights.find import WEIGHTS_FILE, find_weights
from xmixup_jax.weights.pretrained import Weights

log = logging.getLogger('xmixup_jax')


def train_and_evaluate(
    config: ConfigDict, workdir: Path, data: Data | None = None, finish: bool = False
) -> dict[str, Any]:
    """Trains and tests a network, resumes a run that was stopped, or reads a finished one.

    Args:
      config: a configuration that `checks.validate` accepts.
      workdir: folder of the run; gets config.json, environment.json, match.json, metrics.csv,
        tensorboard/, checkpoints/, constants/, model.safetensors, best_model.safetensors,
        ema_model.safetensors, result.json, data.json, per_class.csv, confusion.csv,
        predictions.csv, report.html and SHA256SUMS.
      data: the caller's own records; None: open those of the configuration.
      finish: test the network as trained so far, instead of training on.

    Returns:
      the content of result.json.

    Raises:
      UserError: a problem that the user can fix; the message says how.
    """
    if data is None and not has_result(workdir):
        check_inputs(config)
    with (
        locked(workdir),
        contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)) as checkpoints,
    ):
        finished = claim(config, workdir, checkpoints)
        data = same_data(config, checkpoints, data, finished is not None)
        if finished:
            return finished
        assert data is not None  # only a finished run can do without
        data.log_usage()
        return _train(config, checkpoints, data, finish)


def _train(
    config: ConfigDict, checkpoints: Checkpoints, data: Data, finish: bool
) -> dict[str, Any]:
    """Makes the run in the folder of `checkpoints`, which is locked by this run."""
    workdir = checkpoints.workdir

    def train(auxiliary: ConfigDict, name: str, data: Data) -> dict[str, Any]:
        return train_and_evaluate(auxiliary, workdir / name, data)

    start = resume(config, checkpoints)
    if start is None:
        if finish:
            raise DataError(
                f'{workdir} has no checkpoint yet: run its training command first, then finish it'
            )
        start = begin(config, data, backbone_weights(config, data.source), checkpoints, train)
        _set_best_aside(workdir)
    record(workdir / ENVIRONMENT, int(start.state.step))
    if start.meta.match is not None:
        report_match(workdir, start.meta.match, data)

    inputs = open_input(config, data, start.meta.match)
    best = Best(workdir, config, data.target.class_names)
    clean = partial(with_clean_statistics, start.task, config, target=inputs.data.target)
    with tracked(config, workdir) as tracker:
        last, speed = fit(config, start, inputs, best, checkpoints, clean, tracker, finish)
        networks, tested, measured = _tested(config, start.task, clean, last, inputs.data, best)
        count = 0 if tested is None else len(tested.label)
        result = summary(config, workdir, inputs.data, speed, measured, int(last.step), count)
        write_outcome(config, workdir, start, inputs.data, networks, tested, result)
        if tracker is not None:
            tracker.summary.update({f'result/{key}': value for key, value in result.items()})
        return result


@first_process
def _set_best_aside(workdir: Path) -> None:
    """Moves away the best network of a run whose checkpoints are gone."""
    if (workdir / BEST).exists():
        log.warning(
            '%s is of an earlier run: moved to %s', BEST, set_aside(workdir / BEST, workdir)
        )


def _tested(
    config: ConfigDict,
    task: Task,
    clean: Callable[[TrainState], TrainState],
    last: TrainState,
    data: Data,
    best: Best,
) -> tuple[dict[str, TrainState], Tested | None, dict[str, Any]]:
    """Tests the run's networks.

    Returns:
      (networks by the name of their file, the test of the first one, all scores).
    """
    state = chosen_network(config, task, clean(last), data.validation, best)
    networks, tested = {WEIGHTS_FILE: state}, test(config, task, state, data.test)
    if tested is not None and config.eval_every and data.validation is None:
        best.offer(state, tested.metrics)
    measured = (scores(tested) if tested else {}) | best.score
    if config.ema_decay:
        networks[AVERAGE] = clean(averaged(last))
        of_average = test(config, task, networks[AVERAGE], data.test)
        if of_average is not None:
            measured |= {f'ema_{key}': value for key, value in of_average.metrics.items()}
    return networks, tested, measured


def backbone_weights(config: ConfigDict, source: Records | None = None) -> Weights | None:
    """Returns the weights to start from, or None for random ones.

    With config.weights=source, trains them on the source first, unless an earlier run has done so.

    Args:
      config: configuration of the run.
      source: the run's source records, if they are the caller's own.
    """
    if config.weights == '':
        return None
    if config.weights != 'source':
        return _read_weights(config.weights, config.model.name)
    pretrain = config_lib.pretrain_config(config)
    data = source_data(config, pretrain, source)
    # The folder identifies the data by content, so its configuration must not name their location.
    short = short_name(data.target.name)
    pretrain.source.name = pretrain.target.name = short
    name = f'{short}-{config.model.name}-{config_lib.digest(pretrain)}-{data_digest(data)}'
    folder = Path(config.cache_dir).expanduser() / 'pretrained' / name
    with locked(folder.with_name(folder.name + '.lock'), '--config.cache_dir', wait=True):
        if not (folder / RESULT).exists():
            log.info(
                'Pre-training %s on %s, once for all runs, in %s',
                config.model.name,
                data.target.name,
                folder,
            )
        train_and_evaluate(pretrain, folder, data)  # returns at once if that has been done
    return _read_weights(str(folder), config.model.name)


@every_process
def _read_weights(name: str, model: str) -> Weights:
    return Weights(find_weights(name), model)
