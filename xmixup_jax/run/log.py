"""Logs a run's metrics to the progress bar, metrics.csv, TensorBoard and Weights & Biases."""

import contextlib
import csv
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xmixup_jax.errors import UserError
from xmixup_jax.files import METRICS, atomic_write
from xmixup_jax.run.events import Event, EventsWriter, SessionLog, Summary

COLUMNS = (
    'step',
    'loss',
    'top1',
    'learning_rate',
    'images_per_second',
    'test_loss',
    'test_top1',
    'validation_loss',
    'validation_top1',
)
PRINT_SECONDS = 30.0  # between two lines if there is no terminal for a progress bar


class RunLog:
    """The log of a run. A resumed run rewrites the rows of its checkpoint and continues there."""

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        rows: list[dict[str, float]],
        steps: int,
        title: str,
        tracker: Any = None,
    ):
        """Opens the files.

        Args:
          workdir: folder of the run; gets metrics.csv and tensorboard/.
          first_step: number of steps done before.
          rows: rows of metrics.csv up to that step.
          steps: number of steps of the whole run.
          title: title of the progress bar.
          tracker: a wandb run, or None; see `tracking.tracked`.
        """
        self.rows = list(rows)
        self._path = workdir / METRICS
        with atomic_write(self._path) as partial, partial.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, restval='')
            writer.writeheader()
            writer.writerows(rows)
        self._file = self._path.open('a', newline='')
        self._csv = csv.DictWriter(self._file, COLUMNS, restval='')
        folder = workdir / 'tensorboard'
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread blocks forever on a full disk.
        self._tensorboard = EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')
        purge = SessionLog(status=SessionLog.START)
        self._tensorboard.write_event(Event(step=first_step + 1, session_log=purge))
        self._title = title
        self._tracker = tracker
        self._total = steps
        self._terminal = sys.stderr.isatty()
        self._printed = time.monotonic()
        if not self._terminal and first_step < steps:
            print(f'{title}  step {first_step}/{steps}  compiling', file=sys.stderr)
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=title,
            unit='step',
            disable=not self._terminal,
            dynamic_ncols=True,
            leave=None,  # keep the bar, unless it is nested in another one
        )

    def advance(self, steps: int) -> None:
        """Advances the progress bar by the number of steps dispatched."""
        self._bar.update(steps)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs a row for the steps up to `step`.

        Args:
          step: the last step of the row.
          values: values by column; see COLUMNS.

        Raises:
          UserError: the files cannot be written, for example because the disk is full.
        """
        self.rows.append({'step': step, **values})
        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        )
        try:
            self._csv.writerow(self.rows[-1])
            self._file.flush()
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._tensorboard.flush()
            if self._tracker is not None:  # wandb ignores steps that a resumed run repeats
                self._tracker.log(values, step=step)
        except OSError as error:
            raise UserError(
                f'{self._path} and tensorboard/ next to it cannot be written ({error.strerror}): '
                'free disk space and run the same command again; it resumes from the newest '
                'checkpoint'
            ) from error
        shown = {
            'loss': f'{values["loss"]:.3f}',
            'top1': f'{values["top1"]:.3f}',
            'images/s': f'{values["images_per_second"]:.0f}',
        }
        self._bar.set_postfix(shown, refresh=False)
        if not self._terminal and time.monotonic() - self._printed > PRINT_SECONDS:
            self._printed = time.monotonic()
            words = '  '.join(f'{name} {value}' for name, value in shown.items())
            print(f'{self._title}  step {step}/{self._total}  {words}', file=sys.stderr)

    def close(self) -> None:
        """Closes the progress bar and the files."""
        self._bar.close()
        # `write` has already reported what could not be written.
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):
                file.close()


class NoLog:
    """Replaces `RunLog` in all processes of a run but the first."""

    rows: tuple[dict[str, float], ...] = ()

    def advance(self, steps: int) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
