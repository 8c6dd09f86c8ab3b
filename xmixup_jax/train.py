"""A whole run, top to bottom: data, backbone, class match, training, evaluation, result."""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.best import Best
from xmixup_jax.checkpoint import Checkpoints
from xmixup_jax.data.cache import choose, used_records, with_caches
from xmixup_jax.data.pairing import train_batches
from xmixup_jax.data.sources import Data, Opened, problem, train_and_test, train_records
from xmixup_jax.devices import shard
from xmixup_jax.errors import DataError, raise_all
from xmixup_jax.evaluation import evaluate
from xmixup_jax.files import read_json, write_json
from xmixup_jax.loop import Diverged, fit
from xmixup_jax.matching import ClassMatch, check_assignment
from xmixup_jax.methods import METHODS
from xmixup_jax.models.find_weights import WEIGHTS_FILE, find_weights
from xmixup_jax.models.pretrained import Weights, save_weights
from xmixup_jax.pool import fill_pool
from xmixup_jax.preparation import begin, resume
from xmixup_jax.processes import is_first, together
from xmixup_jax.provenance import commit, record
from xmixup_jax.reestimation import with_clean_statistics
from xmixup_jax.report.run import write_report
from xmixup_jax.step import Task
from xmixup_jax.tracking import tracked
from xmixup_jax.workdir import ENVIRONMENT, MATCH, RESULT, claim, locked, seal

log = logging.getLogger('xmixup_jax')


def train_and_evaluate(
    config: ConfigDict, workdir: Path, data: Data | None = None
) -> dict[str, Any]:
    """Trains, or continues, or merely reports the run in `workdir`.

    Args:
      config: an experiment, as `config.validate` accepts it.
      workdir: folder of the run; gets config.json, environment.json, match.json, metrics.csv,
        tensorboard/, checkpoints/, constants/, model.safetensors, best_model.safetensors,
        result.json, report.html and SHA256SUMS.
      data: the records, where the caller has them; otherwise the configuration's are opened.

    Returns:
      the content of result.json.

    Raises:
      UserError: something that the user can mend.
    """
    if data is None:
        together(lambda: check_inputs(config))
    with (
        locked(workdir),
        contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        finished = claim(config, workdir, checkpoints)
        if finished:
            return finished
        data = data or together(lambda: open_data(config))

        def train(auxiliary: ConfigDict, name: str, data: Data) -> dict[str, Any]:
            return train_and_evaluate(auxiliary, workdir / name, data)

        start = resume(config, checkpoints)
        if start is None:
            start = begin(config, data, backbone_weights(config), checkpoints, train)
        if is_first():
            record(workdir / ENVIRONMENT, int(start.state.step))
        if start.meta.match is not None:
            report_match(workdir, start.meta.match, data)
        batches, pool, data = open_input(config, data, start.meta.match)
        best = Best(workdir, config, data.target.class_names)
        tracker = stack.enter_context(tracked(config, workdir))
        tested_state = partial(with_clean_statistics, start.task, config, target=data.target)
        state, speed = fit(
            config, start, batches, pool, data.test, best, checkpoints, tested_state, tracker
        )
        state = tested_state(state)
        if speed['images_per_second'] is None and (workdir / RESULT).exists():
            speed |= {key: read_json(workdir / RESULT)[key] for key in speed}  # nothing was trained
        tested = evaluate(start.task, config, state, data.test) if data.test else None
        metrics = tested.metrics if tested else {}
        if not np.isfinite(list(metrics.values())).all():
            raise Diverged(
                f'the loss on the test images is not finite after step {config.steps}, the '
                f'checkpoints are in {workdir}: lower config.optimizer.learning_rate'
            )
        if data.test and config.eval_every:
            best.offer(state, metrics)
        result = {
            'method': config.method,
            'seed': config.seed,
            **metrics,
            **best.score,
            'steps': config.steps,
            **speed,
            'train_images': len(data.target),
            'test_images': len(data.test) - data.test.skipped if data.test else 0,
            'skipped_images': sum(part.skipped for part in data if part is not None),
            'num_classes': len(data.target.class_names),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'commit': commit(),
        }
        inputs = first_inputs(start.task, config, data, start.meta.match) if config.report else {}

        def write() -> None:
            if not is_first():
                return
            save_weights(
                workdir / WEIGHTS_FILE,
                config.model.name,
                state.params,
                state.batch_stats,
                {'class_names': data.target.class_names, 'config': config.to_dict()},
            )
            write_json(workdir / RESULT, result)
            if config.report:
                write_report(workdir, config, result, data, start.meta.match, inputs, tested)
            seal(workdir)

        together(write)  # another process may want to read it next
        if tracker is not None:
            tracker.summary.update({f'result/{key}': value for key, value in result.items()})
        return result


def uses_source(config: ConfigDict) -> bool:
    """Whether the method reads the source's records."""
    method = METHODS[config.method]
    return method.pairs or method.reads_source(config)


def data_sets(config: ConfigDict) -> dict[str, str]:
    """The names of the data sets that the run reads, by 'target' and 'source'."""
    names = {'target': config.target.name}
    if uses_source(config) or config.weights == 'source':
        names['source'] = config.source.name
    return names


def check_inputs(config: ConfigDict) -> None:
    """Raises DataError with everything that is missing, data sets and weights, in one message."""
    names = data_sets(config)
    missing = {f'config.{key}.name': problem(name, config) for key, name in names.items()}
    if config.weights not in ('', 'source'):
        try:
            find_weights(config.weights)
        except DataError as error:
            missing['config.weights'] = str(error)
    raise_all(missing)


def open_data(config: ConfigDict, opened: Opened | None = None) -> Data:
    """Opens the records of the run; checks that the classes can be matched, if they have to be.

    Args:
      config: of the run.
      opened: what earlier runs have opened, to share it; see `sources.open_split`.
    """
    target, test = train_and_test(config.target, config, opened)
    if not uses_source(config):
        return Data(target, test, None)
    source = train_records(config.source, config, opened)
    if METHODS[config.method].pairs:
        check_assignment(
            config.match.assignment,
            len(target.class_names),
            len(source.class_names),
            config.match.classes_per_target,
        )
    return Data(target, test, source)


def open_input(
    config: ConfigDict, data: Data, match: ClassMatch | None
) -> tuple[grain.IterDataset, dict[str, jax.Array], Data]:
    """The training batches, and where their decoded images are kept.

    Returns:
      (batches, pool, the data with caches): see `pairing.train_batches`, `pool.fill_pool` and
      `cache.with_caches`.
    """
    used = used_records(data, match)
    kind = together(lambda: choose(config, list(used.values())))
    data = together(lambda: with_caches(config, kind, data, match))
    batches = _batches(config, data, match, config.num_threads, positions=kind == 'device')
    return batches, fill_pool(config, used) if kind == 'device' else {}, data


def first_inputs(
    task: Task, config: ConfigDict, data: Data, match: ClassMatch | None
) -> dict[str, np.ndarray]:
    """What the network sees in the first step: `step.input_step` of the first batch."""
    batches = _batches(config, data, match, num_threads=1, positions=False)
    return jax.device_get(task.input_step(shard(next(iter(batches)))))


def _batches(
    config: ConfigDict, data: Data, match: ClassMatch | None, num_threads: int, positions: bool
) -> grain.IterDataset:
    return train_batches(
        data,
        match,
        seed=config.seed,
        batch_size=config.batch_size,
        resize=config.resize,
        num_threads=num_threads,
        positions=positions,
    )


def backbone_weights(config: ConfigDict) -> Weights | None:
    """The weights to start from; trains them on the source if no run before has done so."""
    if config.weights == '':
        return None
    if config.weights != 'source':
        return together(lambda: Weights(find_weights(config.weights), config.model.name))
    pretrain = config_lib.pretrain_config(config)
    name = f'{config.source.name.split("/")[-1]}-{config.model.name}-{config_lib.digest(pretrain)}'
    folder = Path(config.cache_dir).expanduser() / 'pretrained' / name
    with locked(folder.with_name(folder.name + '.lock'), '--config.cache_dir', wait=True):
        if not (folder / RESULT).exists():
            log.info(
                'Training %s on %s, once, in %s', config.model.name, config.source.name, folder
            )
        train_and_evaluate(pretrain, folder)  # if that has not been done
    return together(lambda: Weights(folder / WEIGHTS_FILE, config.model.name))


def report_match(workdir: Path, match: ClassMatch, data: Data) -> list[dict[str, Any]]:
    """Writes match.json: each target class with its source classes and their similarities.

    Returns:
      what is in it: a 'target', its 'source' classes and their 'similarity' in each row.
    """
    rows = [
        {
            'target': data.target.class_names[i],
            'source': [data.source.class_names[c] for c in classes],
            'similarity': [round(float(s), 6) for s in similarity],
        }
        for i, (classes, similarity) in enumerate(zip(match.classes, match.similarity, strict=True))
    ]
    if is_first():
        write_json(workdir / MATCH, rows)
    return rows
