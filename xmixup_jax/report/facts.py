"""What the folder of a finished run says of its networks, for the card of an export."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from xmixup_jax.files import DATA, ENVIRONMENT, PER_CLASS, PREDICTIONS, RESULT, read_json
from xmixup_jax.report.scores import reliability

_PARTS = ('target', 'validation', 'test', 'source')


class RunFacts(NamedTuple):
    """Results, data and environment of a run."""

    result: dict[str, Any]
    """Of result.json."""
    environment: dict[str, Any]
    """Of the last process that worked on the run; {} where it is not known."""
    counts: dict[str, list[int]]
    """Images of each class, by 'target', 'test', 'source' and 'validation'."""
    rows: list[dict[str, str]]
    """Of per_class.csv; [] where there was no test."""
    ece: float | None
    """Expected calibration error of the test, 0 to 1, from predictions.csv."""


def read_run(folder: Path) -> RunFacts | None:
    """The facts in the folder of a finished run; None where there is no result."""
    if not (folder / RESULT).is_file():
        return None
    data = read_json(folder / DATA) if (folder / DATA).is_file() else {}
    environment = read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else [{}]
    rows: list[dict[str, str]] = []
    if (folder / PER_CLASS).is_file():
        with (folder / PER_CLASS).open(newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
    ece = _calibration(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else None
    counts = {part: data[part]['counts'] for part in _PARTS if data.get(part)}
    return RunFacts(read_json(folder / RESULT), environment[-1], counts, rows, ece)


def _calibration(path: Path) -> float:
    """The expected calibration error, from the columns of `scores.write_scores`."""
    with path.open(newline='', encoding='utf-8') as file:
        header, *rows = csv.reader(file)
    best_first = header[3:5] == ['class1', 'probability1']
    sure = [float(row[4]) if best_first else max(map(float, row[3:])) for row in rows]
    wrong = [row[1] != row[2] for row in rows]
    # Two columns, the answer and all else, are enough.
    return reliability(np.stack([sure, np.zeros(len(sure))], axis=1), np.array(wrong)).ece


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of right answers.

    >>> '{:.3f} to {:.3f}'.format(*wilson(90, 100))
    '0.826 to 0.945'
    """
    found = stats.binomtest(right, count).proportion_ci(method='wilson')
    return float(found.low), float(found.high)


def is_of_final(run: RunFacts | None, network: str) -> bool:
    """Whether the figures of the run's test are those of this network."""
    if run is None or network == 'ema':
        return False
    return network == 'final' or run.result.get('best_by') == 'validation'


def scores_of(run: RunFacts, network: str) -> dict[str, float]:
    """'top1' and others, of this network on the test images; {} without a test."""
    result = run.result
    if is_of_final(run, network):
        keys = ('top1', 'top5', 'macro_top1', 'macro_f1', 'loss')
        found = {key: result[key] for key in keys if key in result}
        return found | ({'ece': run.ece} if run.ece is not None else {})
    prefix = 'ema_' if network == 'ema' else 'best_'
    return {key: result[prefix + key] for key in ('top1', 'loss') if prefix + key in result}


def interval(top1: float, images: int) -> str:
    """`wilson` of an accuracy on so many images, in words.

    >>> interval(0.9, 100)
    '82.6 to 94.5 %'
    """
    low, high = wilson(round(top1 * images), images)
    return f'{100 * low:.1f} to {100 * high:.1f} %'
