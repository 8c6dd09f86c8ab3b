"""The training loop."""

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax import step as step_lib
from xmixup_jax.checkpoint import Checkpoints
from xmixup_jax.data.records import Records
from xmixup_jax.errors import Interrupted, UserError
from xmixup_jax.evaluation import evaluate
from xmixup_jax.metrics import RunLog
from xmixup_jax.optimizer import make_schedule
from xmixup_jax.preparation import Start


class Diverged(UserError):
    """The loss is not finite any more."""


class Speed:
    """Images a second between logs, without compilation, evaluation and checkpoints."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._images, self._seconds = 0, 0.0
        self._step: int | None = None
        self._time = 0.0

    @property
    def running(self) -> bool:
        return self._step is not None

    def start(self, step: int) -> None:
        """Begins an interval after `step` steps."""
        self._step, self._time = step, time.perf_counter()

    def stop(self, step: int) -> float:
        """Ends the interval; its images a second."""
        images = (step - self._step) * self._batch_size
        seconds = time.perf_counter() - self._time
        self._images += images
        self._seconds += seconds
        return round(images / seconds, 1)

    @property
    def mean(self) -> float | None:
        """Images a second over all intervals; None where there was but one step."""
        return round(self._images / self._seconds, 1) if self._images else None


def fit(
    config: ConfigDict,
    start: Start,
    batches: grain.IterDataset,
    test: Records | None,
    checkpoints: Checkpoints,
    workdir: Path,
) -> tuple[step_lib.TrainState, dict[str, float | None]]:
    """Trains from `start` up to config.steps.

    Returns:
      (state, {'images_per_second', 'first_step_seconds', 'seconds'}): the first step of this
      process, most of it compilation; the wall time of preparation and loop over all parts of the
      run, compilation, evaluation and checkpoints included.

    Raises:
      Interrupted: SIGTERM or SIGINT, after a checkpoint.
      Diverged: the loss is not finite.
    """
    task, state, constants, meta = start
    iterator = iter(batches)
    if meta.iterator is not None:
        iterator.set_state(meta.iterator)
    first_step = int(state.step)
    begun = time.perf_counter()

    def seconds() -> float:
        return meta.seconds + time.perf_counter() - begun

    schedule = make_schedule(config.optimizer, config.steps)
    title = f'{config.target.name.split("/")[-1]} {config.method}'
    log = RunLog(workdir, first_step, config.steps, title)
    pending: list[Any] = []  # metrics that are still on the device
    first_step_seconds = None
    speed = Speed(config.batch_size)

    with stop_signal() as stopping, contextlib.closing(log):
        for step, (batch, iterator_state) in enumerate(
            prefetch(iterator, config.steps - first_step), first_step + 1
        ):
            dispatched = time.perf_counter()
            state, metrics = task.train_step(constants, state, batch)
            step_lib.wait_if_simulated(metrics)
            pending.append(metrics)
            log.advance()
            if not speed.running:  # the first step of a process compiles: it does not count
                jax.block_until_ready(metrics)
                first_step_seconds = round(time.perf_counter() - dispatched, 3)
                speed.start(step)
            stop = stopping()
            save = stop or step % config.checkpoint_every == 0 or step == config.steps
            test_now = test is not None and config.eval_every and step % config.eval_every == 0
            # A row at each checkpoint, so that a resumed run's rows cover the same steps.
            if not (save or test_now or step % config.log_every == 0):
                continue
            values = mean_metrics(pending)
            pending = []
            values['learning_rate'] = float(schedule(step - 1))
            values['images_per_second'] = speed.stop(step)
            check_finite(values, step, checkpoints)
            if test_now and step < config.steps:  # the last one is the run's result
                tested = evaluate(task, config, state, test)
                values |= {f'test_{key}': tested[key] for key in ('loss', 'top1')}
            log.write(step, values)
            if save:
                now = meta._replace(iterator=iterator_state, seconds=seconds())
                checkpoints.save(state, now, config.to_dict())
            if stop and step < config.steps:
                checkpoints.wait()
                raise Interrupted(
                    f'stopped at step {step} of {config.steps} by a signal; saved in {workdir}: '
                    'the same command continues'
                )
            speed.start(step)
    checkpoints.wait()
    return state, {
        'images_per_second': speed.mean,
        'first_step_seconds': first_step_seconds,
        'seconds': round(seconds(), 2),
    }


def prefetch(iterator: grain.DatasetIterator, count: int):
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
    raise Diverged(
        f'the loss is {values["loss"]} at or before step {step}, learning rate '
        f'{values["learning_rate"]:g}{newest}: lower config.optimizer.learning_rate'
    )


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
