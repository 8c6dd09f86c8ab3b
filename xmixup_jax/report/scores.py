"""The numbers of a test: overall scores, calibration, and files with each class and image."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import binned_statistic
from sklearn.metrics import (
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.files import CONFUSION, PER_CLASS, PREDICTIONS, atomic_write
from xmixup_jax.text import valid_text

TOP = 5
MANY_CLASSES = 10  # with more of them, top-5 accuracy is meaningful
_LISTED = 200  # with more classes, predictions.csv has only the TOP highest probabilities


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in bins of equal width."""

    edges: np.ndarray
    """float64 [bins + 1], confidences from 0 to 1."""
    count: np.ndarray
    """int [bins], images."""
    confidence: np.ndarray
    """float64 [bins], mean largest probability; NaN in empty bins."""
    accuracy: np.ndarray
    """float64 [bins], share of correct predictions; NaN in empty bins."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean |accuracy - confidence| over all images, 0 to 1.

        Naeini, Cooper, Hauskrecht, AAAI 2015; Guo, Pleiss, Sun, Weinberger, ICML 2017, eq. 3.
        """
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(np.sum(gaps * self.count) / np.sum(self.count))

    @property
    def mean_confidence(self) -> float:
        """The mean largest probability over all images, 0 to 1."""
        return float(np.sum(np.nan_to_num(self.confidence) * self.count) / np.sum(self.count))


def reliability(probabilities: np.ndarray, label: np.ndarray, bins: int = 15) -> Reliability:
    """Bins the predictions by their confidence.

    Args:
      probabilities: [N, K]; each row sums to 1.
      label: int [N].
      bins: their number.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = (probabilities.argmax(axis=1) == label).astype(np.float64)
    means, edges, _ = binned_statistic(
        confidence, [confidence, correct], 'mean', bins=bins, range=(0.0, 1.0)
    )
    count, _ = np.histogram(confidence, edges)
    return Reliability(edges, count, *means)


def calibration(tested: Tested) -> Reliability:
    """The reliability of a network's outputs."""
    return reliability(softmax(tested.logits.astype(np.float64), axis=1), tested.label)


def scores(tested: Tested) -> dict[str, float]:
    """The scores for result.json.

    Returns:
      'top1' and 'loss'; 'macro_top1' and 'macro_f1', the unweighted means of recall and F1 over the
      classes that have test images; 'top5' with more than MANY_CLASSES classes.
    """
    count, present = tested.logits.shape[1], np.unique(tested.label)
    common = {'labels': present, 'average': 'macro', 'zero_division': 0}
    found = tested.metrics | {
        'macro_top1': float(recall_score(tested.label, tested.predicted, **common)),
        'macro_f1': float(f1_score(tested.label, tested.predicted, **common)),
    }
    if count > MANY_CLASSES:
        found['top5'] = float(
            top_k_accuracy_score(tested.label, tested.logits, k=TOP, labels=range(count))
        )
    return found


def class_rows(tested: Tested, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: 'class', 'images', 'precision', 'recall', 'f1'; 'most_confused_with',
    the class most often predicted in its place, and 'confused', the number of those images."""
    columns = precision_recall_fscore_support(
        tested.label, tested.predicted, labels=range(len(names)), zero_division=0
    )
    wrong = tested.confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows = []
    for c, (name, precision, recall, f1, images) in enumerate(zip(names, *columns, strict=True)):
        other = int(wrong[c].argmax())
        row = {'class': name, 'images': int(images)}
        row |= {'precision': precision, 'recall': recall, 'f1': f1}
        row |= {'most_confused_with': names[other] if wrong[c, other] else ''}
        rows.append(row | {'confused': int(wrong[c, other])})
    return rows


def write_scores(folder: Path, tested: Tested, records: Records) -> None:
    """Writes per_class.csv, confusion.csv and predictions.csv.

    The rows of confusion.csv are the true classes. Each row of predictions.csv has the
    probabilities of all classes; with more than 200 classes, only the TOP highest.

    Args:
      folder: gets the files.
      tested: the network's outputs.
      records: the tested images.
    """
    names = readable(records.class_names)
    rows = class_rows(tested, names)
    _write(folder / PER_CLASS, list(rows[0]), (map(_cell, row.values()) for row in rows))
    _write(
        folder / CONFUSION,
        ['true class', *names],
        ([name, *row] for name, row in zip(names, tested.confusion.tolist(), strict=True)),
    )
    best = [f'{what}{i}' for i in range(1, TOP + 1) for what in ('class', 'probability')]
    few = len(names) <= _LISTED
    header = ['image', 'class', 'predicted', *(names if few else best)]
    _write(folder / PREDICTIONS, header, _predictions(tested, records, names, few))


def _predictions(
    tested: Tested, records: Records, names: Sequence[str], few: bool
) -> Iterable[list[Any]]:
    for logits, label, i in zip(tested.logits, tested.label, tested.index, strict=True):
        probabilities = softmax(logits.astype(np.float64))
        order = np.argsort(-probabilities, kind='stable')
        line = [valid_text(records.describe(int(i))), names[label], names[order[0]]]
        if few:
            yield [*line, *map(_cell, probabilities)]
        else:
            best = ((names[c], _cell(probabilities[c])) for c in order[:TOP])
            yield [*line, *(cell for pair in best for cell in pair)]


def _cell(value: Any) -> Any:
    return f'{value:.6g}' if isinstance(value, float) else value


def _write(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_write(path) as partial, partial.open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(header)
        table.writerows(rows)
