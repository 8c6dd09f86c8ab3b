"""The figures of a test: over all classes, and of each class and image as files."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.files import CONFUSION, PER_CLASS, PREDICTIONS, atomic_write
from xmixup_jax.text import valid_text

TOP = 5
MANY_CLASSES = 10  # with more of them top-5 accuracy says something
_LISTED = 200  # with more classes a prediction's row has its best TOP probabilities alone


def scores(tested: Tested) -> dict[str, float]:
    """The figures for result.json.

    Returns:
      'top1' and 'loss'; 'macro_top1' and 'macro_f1', the means of recall and F1 over the classes
      that have test images, in which each class counts alike; 'top5' where there are more than
      MANY_CLASSES.
    """
    from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score

    count, predicted = tested.logits.shape[1], tested.logits.argmax(axis=1)
    present = np.unique(tested.label)
    common = {'labels': present, 'average': 'macro', 'zero_division': 0}
    found = tested.metrics | {
        'macro_top1': float(recall_score(tested.label, predicted, **common)),
        'macro_f1': float(f1_score(tested.label, predicted, **common)),
    }
    if count > MANY_CLASSES:
        found['top5'] = float(
            top_k_accuracy_score(tested.label, tested.logits, k=TOP, labels=range(count))
        )
    return found


def class_rows(tested: Tested, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: 'class', 'images', 'precision', 'recall', 'f1', 'most_confused_with',
    the other class that most of its images were taken for, and 'confused', how many."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted, numbers = tested.logits.argmax(axis=1), range(len(names))
    columns = precision_recall_fscore_support(
        tested.label, predicted, labels=numbers, zero_division=0
    )
    wrong = confusion_matrix(tested.label, predicted, labels=numbers)
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

    The rows of confusion.csv are the true classes. A row of predictions.csv has the probabilities
    of all classes, or of the TOP best where there are more than 200.

    Args:
      folder: to write into.
      tested: the network's outputs.
      records: those that were tested.
    """
    from sklearn.metrics import confusion_matrix

    names, predicted = readable(records.class_names), tested.logits.argmax(axis=1)
    rows = class_rows(tested, names)
    _write(folder / PER_CLASS, list(rows[0]), (map(_cell, row.values()) for row in rows))
    matrix = confusion_matrix(tested.label, predicted, labels=range(len(names)))
    _write(
        folder / CONFUSION,
        ['true class', *names],
        ([name, *row] for name, row in zip(names, matrix.tolist(), strict=True)),
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
