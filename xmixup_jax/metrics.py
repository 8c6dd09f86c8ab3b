"""Where a run's numbers go: progress bar, metrics.csv, TensorBoard."""

import csv
import sys
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from xmixup_jax.files import whole_file

COLUMNS = (
    'step',
    'loss',
    'top1',
    'learning_rate',
    'images_per_second',
    'test_loss',
    'test_top1',
)


class RunLog:
    """One run's log; a resumed run drops the rows that it is going to write again."""

    def __init__(self, workdir: Path, first_step: int, total_steps: int, title: str):
        path = workdir / 'metrics.csv'
        kept = []
        if first_step and path.exists():
            with path.open(newline='') as file:
                kept = [row for row in csv.DictReader(file) if int(row['step']) <= first_step]
        with whole_file(path) as partial, partial.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open('a', newline='')
        self._csv = csv.DictWriter(self._file, COLUMNS, restval='')
        self._tensorboard = SummaryWriter(str(workdir / 'tensorboard'), purge_step=first_step + 1)
        self._title = title
        self._total = total_steps
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
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
        """Logs `values`, named as in COLUMNS, for the updates up to `step`."""
        self._csv.writerow({'step': step, **values})
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        shown = {
            'loss': f'{values["loss"]:.3f}',
            'top1': f'{values["top1"]:.3f}',
            'images/s': f'{values["images_per_second"]:.0f}',
        }
        self._bar.set_postfix(shown, refresh=False)
        if not self._terminal:
            words = '  '.join(f'{name} {value}' for name, value in shown.items())
            print(f'{self._title}  step {step}/{self._total}  {words}', file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()


class NoLog:
    """What the other processes of a run have in the place of `RunLog`."""

    def advance(self, steps: int) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
