"""A whole run, top to bottom: data, backbone, class match, training, evaluation, result."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax import step as step_lib
from xmixup_jax.checkpoint import Checkpoints
from xmixup_jax.data.pairing import eval_batches, train_batches
from xmixup_jax.data.sources import Records, problem, train_and_test
from xmixup_jax.errors import ConfigError, DataError, Interrupted, UserError
from xmixup_jax.features import class_means
from xmixup_jax.matching import ClassMatch, assign, check_assignment, class_similarity
from xmixup_jax.methods import METHODS
from xmixup_jax.metrics import RunLog
from xmixup_jax.models.pretrained import load_backbone, missing_weights, save_weights

log = logging.getLogger('xmixup_jax')

WEIGHTS_FILE = 'model.safetensors'
_PACKAGES = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'tensorflow-datasets',
    'numpy',
)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or continues, or merely reports the run in `workdir`.

    Args:
      config: an experiment, as `config.validate` accepts it.
      workdir: folder of the run; gets config.json, match.json, metrics.csv, tensorboard/,
        checkpoints/, model.safetensors and result.json.

    Returns:
      the content of result.json.

    Raises:
      UserError: something that the user can mend.
    """
    check_inputs(config)
    with locked(workdir):
        finished = claim(config, workdir)
        if finished:
            return finished
        target, test = train_and_test(config.target, config)
        source = open_source(config, target)
        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        try:
            if checkpoints.steps:
                match, backbone = checkpoints.restore_match(), None
            else:
                backbone = backbone_weights(config)
                match = find_match(config, backbone, target, source)
            if match is not None:
                report_match(workdir, match, target, source)
            num_source = 0 if match is None else len(match.selected)
            task, state = step_lib.create_task(config, len(target.class_names), num_source)
            if backbone is not None:
                state.params, state.batch_stats = load_backbone(
                    backbone, state.params, state.batch_stats
                )
            batches = train_batches(
                target,
                source,
                match,
                seed=config.seed,
                batch_size=config.batch_size,
                resize=config.resize,
                num_threads=config.num_threads,
            )
            state, speed = fit(
                task, step_lib.replicate(state), batches, test, match, checkpoints, workdir
            )
            metrics = evaluate(task, state, test) if test is not None else {}
        finally:
            checkpoints.close()
        if jax.process_index() == 0:
            save_weights(
                workdir / WEIGHTS_FILE,
                state.params,
                state.batch_stats,
                {
                    'class_names': json.dumps(target.class_names),
                    'config': json.dumps(config.to_dict()),
                },
            )
        result = {
            'method': config.method,
            'seed': config.seed,
            **metrics,
            'steps': config.steps,
            **speed,
            'train_images': len(target),
            'test_images': 0 if test is None else len(test),
            'num_classes': len(target.class_names),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
        }
        write_json(workdir / 'result.json', result)
        return result


def check_inputs(config: ConfigDict) -> None:
    """Raises DataError with everything that is missing, data sets and weights, in one message."""
    names = {'target': config.target.name}
    if METHODS[config.method].uses_source or config.weights == 'source':
        names['source'] = config.source.name
    missing = {f'config.{key}.name': problem(name, config) for key, name in names.items()}
    if config.weights not in ('', 'source') and not Path(config.weights).expanduser().is_file():
        missing['config.weights'] = missing_weights(Path(config.weights))
    missing = {key: words for key, words in missing.items() if words}
    if missing:
        lines = [f'{key}: {words}' for key, words in missing.items()]
        raise DataError(lines[0] if len(lines) == 1 else '\n- '.join(['missing:', *lines]))


@contextlib.contextmanager
def locked(workdir: Path, key: str = '--workdir', wait: bool = False):
    """Makes the folder and holds it, so that no second run writes into it; `key` can change it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / '.lock').open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write into {workdir}: {error.strerror}; choose another folder with {key}'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f'another run is writing into {workdir}: wait for it, or choose another --workdir'
            ) from error
        yield


def claim(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Stores the configuration, or compares it with the one that the folder was begun with.

    Returns:
      the result, if the run in the folder is finished.
    """
    path = workdir / 'config.json'
    ours = json.loads(json.dumps(config_lib.experiment_values(config)))
    if path.exists():
        stored = ConfigDict(json.loads(path.read_text()))
        theirs = config_lib.experiment_values(stored)
        changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if changed:
            key = changed[0]
            raise ConfigError(
                f'{workdir} holds a run with config.{key}={theirs.get(key)!r}, not '
                f'{ours.get(key)!r} ({len(changed)} keys differ): choose another --workdir'
            )
    write_json(path, config.to_dict())
    result = workdir / 'result.json'
    return json.loads(result.read_text()) if result.exists() else None


def open_source(config: ConfigDict, target: Records) -> Records | None:
    """The auxiliary records, if the method uses any; checks that the classes can be matched."""
    if not METHODS[config.method].uses_source:
        return None
    source, _ = train_and_test(config.source.copy_and_resolve_references(), config)
    check_assignment(
        config.match.assignment,
        len(target.class_names),
        len(source.class_names),
        config.match.classes_per_target,
    )
    return source


def backbone_weights(config: ConfigDict) -> Path | None:
    """The weights to start from; trains them on the source if no run before has done so."""
    if config.weights == '':
        return None
    if config.weights != 'source':
        return Path(config.weights).expanduser()
    pretrain = config_lib.pretrain_config(config)
    name = f'{config.source.name.split("/")[-1]}-{config.model.name}-{config_lib.digest(pretrain)}'
    folder = Path(config.cache_dir).expanduser() / 'pretrained' / name
    weights = folder / WEIGHTS_FILE
    with locked(folder.with_name(folder.name + '.lock'), '--config.cache_dir', wait=True):
        if not (folder / 'result.json').exists():
            log.info(
                'Training %s on %s, once, in %s', config.model.name, config.source.name, folder
            )
            train_and_evaluate(pretrain, folder)
    return weights


def find_match(
    config: ConfigDict, backbone: Path | None, target: Records, source: Records | None
) -> ClassMatch | None:
    """Matches classes by their mean features in the pre-trained backbone."""
    if source is None:
        return None
    task, state = step_lib.create_task(config, len(target.class_names), 0)
    if backbone is not None:
        state.params, state.batch_stats = load_backbone(backbone, state.params, state.batch_stats)
    state = step_lib.replicate(state)
    similarity = class_similarity(
        class_means(task, state, target), class_means(task, state, source), config.match.similarity
    )
    return assign(similarity, config.match.assignment, config.match.classes_per_target, config.seed)


def report_match(workdir: Path, match: ClassMatch, target: Records, source: Records) -> None:
    """Writes match.json: each target class with its source classes and their similarities."""
    rows = [
        {
            'target': target.class_names[i],
            'source': [source.class_names[c] for c in classes],
            'similarity': [round(float(s), 6) for s in similarity],
        }
        for i, (classes, similarity) in enumerate(zip(match.classes, match.similarity, strict=True))
    ]
    write_json(workdir / 'match.json', rows)


def fit(task, state, batches, test, match, checkpoints: Checkpoints, workdir: Path):
    """The training loop, from the newest checkpoint if there is one.

    Returns:
      (state, {'images_per_second', 'seconds'}): speed between logs, without compilation,
      evaluation and checkpoints; and the wall time of everything, all parts of the run.
    """
    config = task.config
    iterator = iter(batches)
    seconds_before = 0.0
    if checkpoints.steps:
        state, iterator_state, seconds_before = checkpoints.restore(state)
        iterator.set_state(iterator_state)
    first_step = int(state.step)
    schedule = step_lib.make_schedule(config.optimizer, config.steps)
    train_step = step_lib.map_train_step(partial(step_lib.train_step, task))
    title = f'{config.target.name.split("/")[-1]} {config.method}'
    run_log = RunLog(workdir, first_step, config.steps, title)
    stored_config = json.loads(json.dumps(config.to_dict()))
    start = time.perf_counter()
    pending: list[Any] = []  # metrics that are still on the device
    timed_images, timed_seconds, mark = 0, 0.0, None

    def save(iterator_state):
        seconds = seconds_before + time.perf_counter() - start
        checkpoints.save(state, iterator_state, match, seconds, stored_config)

    with stop_signal() as stopping, contextlib.closing(run_log):
        for step, (batch, iterator_state) in enumerate(
            prefetch(iterator, config.steps - first_step), first_step + 1
        ):
            state, metrics = train_step(state, batch)
            step_lib.wait_if_simulated(metrics)
            pending.append(metrics)
            run_log.advance()
            if mark is None:  # the first step of this process compiles: it does not count
                jax.block_until_ready(metrics)
                mark, counted = time.perf_counter(), step
            save_now = step % config.checkpoint_every == 0 or step == config.steps or stopping()
            eval_now = test is not None and config.eval_every and step % config.eval_every == 0
            # A row at each checkpoint, so that a resumed run's rows cover the same steps.
            if step % config.log_every == 0 or save_now or eval_now:
                values = mean_metrics(pending)
                pending = []
                rate = (step - counted) * config.batch_size / max(time.perf_counter() - mark, 1e-9)
                timed_images += (step - counted) * config.batch_size
                timed_seconds += time.perf_counter() - mark
                values['learning_rate'] = float(schedule(step - 1))
                values['images_per_second'] = round(rate, 1)
                check_finite(values, step, checkpoints)
                if eval_now and step < config.steps:
                    tested = evaluate(task, state, test)
                    values |= {f'test_{key}': tested[key] for key in ('loss', 'top1')}
                run_log.write(step, values)
                if save_now:
                    save(iterator_state)
                mark, counted = time.perf_counter(), step
            if stopping() and step < config.steps:
                checkpoints.wait()
                raise Interrupted(
                    f'stopped at step {step} of {config.steps} by a signal; saved in {workdir}: '
                    'the same command with this --workdir continues'
                )
    checkpoints.wait()
    speed = {
        'images_per_second': round(timed_images / timed_seconds, 1) if timed_images else None,
        'seconds': round(seconds_before + time.perf_counter() - start, 2),
    }
    return state, speed


def prefetch(iterator, count: int):
    """Yields `count` pairs (batch on the devices, iterator state after it), one batch ahead."""

    def load():
        batch = next(iterator)
        return step_lib.shard(batch), iterator.get_state()

    if count <= 0:
        return
    ahead = load()
    for _ in range(count - 1):
        current, ahead = ahead, load()
        yield current
    yield ahead


def mean_metrics(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Fetches the metrics of several steps from the device and averages them."""
    rows = jax.device_get(pending)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def check_finite(values: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    """Stops a diverged run before it overwrites good checkpoints."""
    if math.isfinite(values['loss']):
        return
    checkpoints.wait()
    newest = (
        f'; the checkpoint of step {checkpoints.steps[0]} is from before'
        if checkpoints.steps
        else ''
    )
    raise UserError(
        f'the loss is {values["loss"]} at or before step {step}, learning rate '
        f'{values["learning_rate"]:g}{newest}: lower config.optimizer.learning_rate'
    )


def evaluate(task, state, records: Records) -> dict[str, float]:
    """Top-1 accuracy and mean cross-entropy over all records, exactly once each."""
    config = task.config
    eval_step = step_lib.map_eval_step(partial(step_lib.eval_step, task))
    sums = []
    for batch in eval_batches(
        records,
        batch_size=config.eval_batch_size,
        resize=config.resize,
        num_threads=config.num_threads,
    ):
        sums.append(eval_step(state, step_lib.shard(batch)))
        step_lib.wait_if_simulated(sums[-1])
    rows = jax.device_get(sums)
    loss, correct, count = (
        sum(float(row[key]) for row in rows) for key in ('loss', 'correct', 'count')
    )
    return {'top1': correct / count, 'loss': loss / count}


@contextlib.contextmanager
def stop_signal():
    """Yields a function that says whether SIGTERM or SIGINT has arrived; a second one kills."""
    received = []

    def handler(number, frame):
        del frame
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    partial_path = path.with_name(path.name + '.tmp')
    with partial_path.open('w') as file:
        json.dump(value, file, indent=2)
        file.write('\n')
        file.flush()
        os.fsync(file.fileno())
    shutil.move(partial_path, path)
