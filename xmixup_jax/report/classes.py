"""The results of a test by class: mistakes, accuracy, confusion and calibration."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.special import softmax

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.records import Records
from xmixup_jax.errors import DataError
from xmixup_jax.report import figures
from xmixup_jax.report.page import figure_tag, image_uri
from xmixup_jax.report.scores import Reliability, class_rows

_MISTAKEN, _MISTAKES = 6, 8  # limits: classes, and images of each


def thumbnail(records: Records, i: int, config: ConfigDict) -> str | None:
    """Record i as a data URI; None if it cannot be decoded."""
    try:
        image = records.image(i, config.resize, config.fit)
    except DataError:  # too many images are damaged; the report can do without this one
        return None
    return None if image is None else image_uri(image)


def classes_part(
    tested: Tested | None,
    bins: Reliability | None,
    names: list[str],
    test: Records | None,
    config: ConfigDict,
) -> dict[str, Any]:
    """The values of mistakes.html and classes.html.

    Args:
      tested: the network's outputs; None without a test.
      bins: their calibration.
      names: readable class names.
      test: the records of `tested`; some images are read.
      config: of the run; gives the size and shape of the images.
    """
    if tested is None:
        return {'tested': False}
    assert test is not None and bins is not None  # both are of `tested`
    matrix = tested.confusion
    rows: list[dict[str, Any]] = []
    for c, row in enumerate(class_rows(tested, names)):
        count, right = row['images'], int(matrix[c, c])
        if not count:
            continue
        confused = f'{row["most_confused_with"]} ({row["confused"]})' if row['confused'] else ''
        percent = round(100 * right / count, 1)
        rows.append({'c': c, 'name': names[c], 'right': right, 'count': count})
        rows[-1] |= {'percent': percent, 'confused': confused}
    rows.sort(key=lambda row: row['percent'])
    mistakes = []
    for row in rows[:_MISTAKEN]:
        images = _mistakes(tested, row['c'], names, test, config)
        if images:
            mistakes.append(row | {'images': [each for each in images if each['uri']]})
    return {
        'tested': True,
        'classes': rows,
        'confusion': figure_tag(
            figures.confusion(matrix, names),
            f'Confusion matrix of {len(names)} classes: {np.trace(matrix)} of {matrix.sum()} test '
            'images are on the diagonal.',
        ),
        'mistakes': mistakes,
        'ece': f'{100 * bins.ece:.1f} %',
        'reliability': figure_tag(
            figures.reliability(bins),
            f'Reliability: accuracy over confidence, expected calibration error {bins.ece:.3f}.',
        ),
    }


def classes_contents(part: dict[str, Any]) -> list[tuple[str, str]]:
    """Id and name of each section that the values of `classes_part` fill."""
    if not part['tested']:
        return []
    sections = [('classes', 'Classes'), ('confusion', 'Confusion'), ('calibration', 'Calibration')]
    return [('mistakes', 'Mistakes'), *sections] if part['mistakes'] else sections


def _mistakes(
    tested: Tested, c: int, names: list[str], test: Records, config: ConfigDict
) -> list[dict[str, Any]]:
    """The most confident wrong predictions for images of class c."""
    wrong = np.flatnonzero((tested.label == c) & (tested.predicted != c))
    confidence = softmax(tested.logits[wrong].astype(np.float64), axis=1).max(axis=1, initial=0)
    return [
        {
            'uri': thumbnail(test, tested.index[wrong[i]], config),
            'answer': names[tested.predicted[wrong[i]]],
            'probability': f'{confidence[i]:.0%}',
        }
        for i in np.argsort(-confidence)[:_MISTAKES]
    ]
