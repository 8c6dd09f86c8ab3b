"""The training loop."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.compute.state import TrainState
from xmixup_jax.config import is_pretraining, total_steps
from xmixup_jax.data.pairing import Batch
from xmixup_jax.data.sources import short_name
from xmixup_jax.devices import InFlight, shard_steps
from xmixup_jax.errors import Diverged, Interrupted
from xmixup_jax.methods.find import method_name, method_of
from xmixup_jax.optimizer import make_schedule
from xmixup_jax.processes import broadcast, is_first
from xmixup_jax.run.best import Best
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.inputs import Inputs
from xmixup_jax.run.log import NoLog, RunLog
from xmixup_jax.run.signals import stop_signal
from xmixup_jax.run.start import Start

PyTree = Any

log = logging.getLogger('xmixup_jax')


class Speed:
    """Measures images per second between logs, without compilation, evaluation and checkpoints."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._images, self._seconds = 0, 0.0
        self._step: int | None = None
        self._time = 0.0

    @property
    def running(self) -> bool:
        """Whether an interval has been started."""
        return self._step is not None

    def start(self, step: int) -> None:
        """Starts an interval after `step` steps."""
        self._step, self._time = step, time.perf_counter()

    def stop(self, step: int) -> float:
        """Ends the interval; returns its images per second."""
        assert self._step is not None  # `start` was called
        images = (step - self._step) * self._batch_size
        seconds = time.perf_counter() - self._time
        self._images += images
        self._seconds += seconds
        return round(images / seconds, 1)

    @property
    def mean(self) -> float | None:
        """Images per second over all intervals; None after a single step."""
        return round(self._images / self._seconds, 1) if self._images else None


class CheckpointTimer:
    """Tells when to save: not before config.checkpoint_seconds have passed since the last time.

    The first process decides for all of them.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock = seconds, clock
        self._saved = clock()

    def saved(self) -> None:
        """Starts to wait again."""
        self._saved = self._clock()

    def is_due(self) -> bool:
        """Returns whether to save now; all processes call it at once."""
        return broadcast(self._clock() - self._saved >= self._seconds)


def fit(
    config: ConfigDict,
    start: Start,
    inputs: Inputs,
    best: Best,
    checkpoints: Checkpoints,
    tested_state: Callable[[TrainState], TrainState] = lambda state: state,
    tracker: Any = None,
    finish: bool = False,
) -> tuple[TrainState, dict[str, float | None]]:
    """Trains from `start` to `config.total_steps`, or until early stopping by config.patience.

    Args:
      config: configuration of the run.
      start: where to start.
      inputs: batches to train on, and records for tests during training.
      best: keeps the best network of these tests.
      checkpoints: the run's checkpoints; the logs are written to its folder.
      tested_state: turns a training state into the one that is tested, and kept as the best; see
        `reestimation.with_clean_statistics`.
      tracker: also gets the rows of the log; see `tracking.tracked`.
      finish: do not take any further step.

    Returns:
      (state, {'images_per_second', 'first_step_seconds', 'seconds'}). 'first_step_seconds' is the
      first step of this process, mostly compilation. 'seconds' is the wall time of preparation and
      training over all parts of the run, including compilation, evaluation and checkpoints.

    Raises:
      Interrupted: SIGTERM or SIGINT arrived; a checkpoint has been saved.
      Diverged: the loss or a parameter is not finite.
    """
    task, state, constants, meta = start
    workdir = checkpoints.workdir
    iterator, held_out = iter(inputs.batches), inputs.data.held_out
    if meta.iterator is not None:
        iterator.set_state(meta.iterator)
    first_step, steps = int(state.step), total_steps(config)
    begun = time.perf_counter()

    def seconds() -> float:
        return meta.seconds + time.perf_counter() - begun

    schedule = make_schedule(config.optimizer, config.steps)
    title = f'{short_name(config.target.name)} {method_name(config.method)}'
    rows: RunLog | NoLog = NoLog()
    if is_first():
        rows = RunLog(workdir, first_step, meta.rows, steps, title, tracker)
    first_step_seconds = None
    speed = Speed(config.batch_size)
    timer = CheckpointTimer(config.checkpoint_seconds)
    pending: list[Any] = []  # metrics since the last row, still on the devices
    row: tuple[int, list[Any]] | None = None  # (step, metrics) of the last row, not fetched yet

    def fetched(step: int, metrics: list[Any]) -> dict[str, float]:
        of_steps = fetch_metrics(metrics)
        check_finite(of_steps['loss'], step, config, checkpoints)
        values = {key: float(value.mean()) for key, value in of_steps.items()}
        values['learning_rate'] = float(schedule(step - 1))
        values['images_per_second'] = speed.stop(step)
        speed.start(step)
        return values

    def save_now(iterator_state: dict[str, Any]) -> None:
        now = meta._replace(
            config=config.to_dict(),
            iterator=iterator_state,
            seconds=seconds(),
            rows=list(rows.rows),
        )
        checkpoints.save(state, now)
        timer.saved()

    with stop_signal() as stopping, contextlib.closing(rows):
        if not checkpoints.steps:  # saves the preparation, and a state from before any divergence
            save_now(iterator.get_state())
        stop_agreed = AgreedStop(stopping)
        # A run may be killed between early stopping and writing its result.
        if finish or best.exhausted(first_step):
            steps = first_step
        for step, batch, iterator_state in prefetch(
            iterator, config, first_step, steps, stop_agreed
        ):
            dispatched = time.perf_counter()
            state, metrics = task.train_steps(constants, state, inputs.pool, batch)
            pending.append(metrics)
            rows.advance(len(metrics['loss']))
            if row is not None:  # fetch it only now that the next program is running
                rows.write(row[0], fetched(*row))
                row = None
            stop = stop_agreed.after(metrics)
            if not speed.running:  # the first program includes compilation: do not count it
                jax.block_until_ready(metrics)
                first_step_seconds = round(time.perf_counter() - dispatched, 3)
                speed.start(step)
            may_save = step % config.checkpoint_every == 0
            save = stop or step == steps or (may_save and timer.is_due())
            test_now = held_out is not None and config.eval_every and step % config.eval_every == 0
            # Each possible checkpoint ends a row, so the rows of any run cover the same steps.
            if save or may_save or test_now or step % config.log_every == 0:
                row, pending = (step, pending), []
            if not (save or test_now):
                continue
            assert row is not None  # each save and each test ends a row
            values, row = fetched(*row), None
            # The test after the last step is made later, as the run's result.
            if held_out is not None and test_now and step < steps:
                network = tested_state(state)
                tested = evaluate(task, config, network, held_out).metrics
                part = inputs.data.held_out_part
                values |= {f'{part}_{key}': tested[key] for key in ('loss', 'top1')}
                best.offer(network, tested)
            rows.write(step, values)
            ended = best.exhausted(step)
            if save or ended:
                check_state(state, config, checkpoints)
                save_now(iterator_state)
            if ended:
                log.info(
                    'Early stopping at step %d of %d (config.patience=%d)',
                    step,
                    steps,
                    config.patience,
                )
                break
            if stop and step < steps:
                or_finish = ', or  xmixup finish  to test the network as it is'
                raise Interrupted(
                    f'stopped at step {step} of {steps} by a signal; saved in {workdir}: run the '
                    f'same command to resume{"" if is_pretraining(config) else or_finish}'
                )
            speed.start(step)
    return state, {
        'images_per_second': speed.mean,
        'first_step_seconds': first_step_seconds,
        'seconds': round(seconds(), 2),
    }


class AgreedStop:
    """Makes all processes stop after the same step.

    A signal reaches the processes at different steps. Each process therefore puts its own wish to
    stop into its batches, and the step returns the maximum over all processes, which is read late
    so that the devices never wait. (JAX's preemption sync point handles only SIGTERM, for which it
    installs its own handler, and not Ctrl-C; runs of one process would need a second mechanism.)
    """

    def __init__(self, stopping: Callable[[], bool]):
        self._stopping = stopping
        self._in_flight = InFlight()

    def tell(self, batch: Batch) -> Batch:
        """Adds this process's wish to stop to the batch, if there are other processes."""
        if jax.process_count() == 1:
            return batch
        return batch | {'stop': np.full(len(batch['label']), self._stopping(), np.int32)}

    def after(self, metrics: PyTree) -> bool:
        """Whether to stop after a program, given its metrics; limits the programs in flight."""
        ended = self._in_flight.add(metrics)
        if jax.process_count() == 1:
            return self._stopping()
        return any(bool(np.any(jax.device_get(each['stop']))) for each in ended)


def prefetch(
    iterator: grain.DatasetIterator,
    config: ConfigDict,
    first_step: int,
    steps: int,
    stop: AgreedStop,
) -> Iterator[tuple[int, PyTree, Any]]:
    """Loads batches onto the devices, one program ahead.

    Args:
      iterator: yields batches on the host.
      config: configuration of the run.
      first_step: number of steps done before.
      steps: step at which to end.
      stop: adds the wish to stop to the batches.

    Yields:
      (number of the last step, the batches up to it, the iterator's state after them), for
      config.steps_per_dispatch steps at a time, or for fewer at the ends.
    """

    def load(done):
        # Aligned, so that a run that goes on from any step tests and saves after the same ones.
        count = min(config.steps_per_dispatch - done % config.steps_per_dispatch, steps - done)
        batches = [stop.tell(next(iterator)) for _ in range(count)]
        return done + count, shard_steps(batches), iterator.get_state()

    if first_step >= steps:
        return
    ahead = load(first_step)
    while ahead[0] < steps:
        current, ahead = ahead, load(ahead[0])
        yield current
    yield ahead


def fetch_metrics(pending: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Fetches 'loss' and 'top1' of each step, [steps], from the metrics of several programs."""
    rows = jax.device_get([{key: row[key] for key in ('loss', 'top1')} for row in pending])
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def check_finite(loss: np.ndarray, last: int, config: ConfigDict, checkpoints: Checkpoints) -> None:
    """Stops a diverged run before it overwrites good checkpoints.

    Args:
      loss: losses of the steps up to `last`, [steps].
      last: the newest step.
      config: configuration of the run.
      checkpoints: checkpoints of the run.

    Raises:
      Diverged: a loss is not finite; names the first such step.
    """
    bad = np.flatnonzero(~np.isfinite(loss))
    if bad.size:
        step = last - len(loss) + 1 + int(bad[0])
        raise _diverged(f'the loss is {loss[bad[0]]} at', step, config, checkpoints)


def check_state(state: TrainState, config: ConfigDict, checkpoints: Checkpoints) -> None:
    """Does the same for parameters and statistics, before they are saved.

    The loss of a step is computed before its update, so it may still be finite.

    Raises:
      Diverged: a parameter or statistic is not finite.
    """
    if not _all_finite((state.params, state.batch_stats)):
        step = int(state.step)
        raise _diverged('parameters are not finite after', step, config, checkpoints)


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _diverged(what: str, step: int, config: ConfigDict, checkpoints: Checkpoints) -> Diverged:
    rate = float(make_schedule(config.optimizer, config.steps)(step - 1))
    method, name = method_of(config), method_name(config.method)
    keys = ['optimizer.learning_rate']
    if method.penalty is not None and method.options:
        keys.append(f'{name}.{next(iter(method.options))}')  # the penalty's weight comes first
    before = ' and '.join(str(step) for step in checkpoints.steps)
    return Diverged(
        f'{what} step {step}, learning rate {rate:g}: lower '
        f'{" or ".join(f"config.{key}" for key in keys)}; to resume from the newest checkpoint in '
        f'{checkpoints.workdir} (there are: {before or "none"}), add --config.allow_changes=True'
    )
