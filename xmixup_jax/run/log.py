"""Where a run's numbers go: progress bar, metrics.csv, TensorBoard."""

import contextlib
import csv
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from xmixup_jax.errors import UserError
from xmixup_jax.files import METRICS, atomic_write

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
PRINT_SECONDS = 30.0  # between two lines where there is no terminal for a progress bar


class RunLog:
    """One run's log. A resumed run writes the rows of its checkpoint and goes on from there."""

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
          workdir: gets metrics.csv and tensorboard/.
          first_step: number of updates that were done before.
          rows: of metrics.csv, up to there.
          steps: of the whole run.
          title: of the progress bar.
          tracker: a run of wandb, see `tracking.tracked`.
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
        # Not SummaryWriter, whose thread waits for ever for a disk that is full.
        self._tensorboard = EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')
        purge = SessionLog(status=SessionLog.START)
        self._tensorboard.write_event(Event(step=first_step + 1, session_log=purge))
        self._title = title
        self._tracker = tracker
        self._total = steps
        self._terminal = sys.stderr.isatty()
        self._printed = time.monotonic()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=title,
            unit='step',
            disable=not self._terminal,
            dynamic_ncols=True,
            leave=None,  # unless it stands below another bar
        )

    def advance(self, steps: int) -> None:
        """So many more steps have been dispatched."""
        self._bar.update(steps)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values`, named as in COLUMNS, for the updates up to `step`.

        Raises:
          UserError: there is no room.
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
            if self._tracker is not None:  # steps that are done again are not logged again there
                self._tracker.log(values, step=step)
        except OSError as error:
            raise UserError(
                f'{self._path} and tensorboard/ beside it cannot be written ({error.strerror}): '
                'make room and run the same command again; it continues from the newest checkpoint'
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
        self._bar.close()
        # What could not be written has been reported.
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):
                file.close()


class NoLog:
    """What the other processes of a run have in the place of `RunLog`."""

    rows: tuple[dict[str, float], ...] = ()

    def advance(self, steps: int) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
