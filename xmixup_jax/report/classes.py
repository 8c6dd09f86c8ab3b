"""What a test says about each class: confusion, accuracy, mistakes and calibration."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.special import softmax

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.records import Records
from xmixup_jax.errors import DataError
from xmixup_jax.report import figures
from xmixup_jax.report.page import figure_tag, image_uri
from xmixup_jax.report.scores import class_rows, reliability

_MISTAKEN, _MISTAKES = 6, 8  # classes and images of each, shown at most


def thumbnail(records: Records, i: int, config: ConfigDict) -> str | None:
    """Record i as a data URI; None if it cannot be read."""
    try:
        image = records.image(i, config.resize, config.fit)
    except DataError:  # too many images are damaged; the run had no need of this one
        return None
    return None if image is None else image_uri(image)


def classes_part(
    tested: Tested | None, names: list[str], test: Records | None, config: ConfigDict
) -> dict[str, Any]:
    """The values of classes.html.

    Args:
      tested: the network's outputs; None where there was no test.
      names: of the classes, for people.
      test: the records of `tested`; some images are read.
      config: of the run; gives size and shape of the images.
    """
    if tested is None:
        return {'tested': False}
    assert test is not None  # the records of `tested`
    probabilities = softmax(tested.logits.astype(np.float64), axis=1)
    answer, matrix = tested.predicted, tested.confusion
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
        wrong = np.flatnonzero((tested.label == row['c']) & (answer != row['c']))
        surest = wrong[np.argsort(-probabilities[wrong, answer[wrong]])][:_MISTAKES]
        images = [
            {
                'uri': thumbnail(test, tested.index[i], config),
                'answer': names[answer[i]],
                'probability': f'{probabilities[i, answer[i]]:.0%}',
            }
            for i in surest
        ]
        if images:
            mistakes.append(row | {'images': [each for each in images if each['uri']]})
    bins = reliability(probabilities, tested.label)
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
