"""Scores of a test compared with their definitions in NumPy, and the files with them."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from xmixup_jax.compute import evaluation
from xmixup_jax.data.records import Records
from xmixup_jax.report.scores import class_rows, scores, write_scores

COUNT, CLASSES = 40, 12


def outputs(seed, classes=CLASSES, label=None):
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=COUNT) if label is None else label
    logits = rng.normal(size=(COUNT, classes)).astype(np.float32)
    logits[np.arange(COUNT), label] += 1
    return evaluation.Tested(logits, label.astype(np.int32), np.arange(COUNT))


def by_definition(tested):
    """(precision, recall, F1) of each class that has images."""
    predicted, found = tested.logits.argmax(1), {}
    for c in np.unique(tested.label):
        right = np.sum((predicted == c) & (tested.label == c))
        precision = right / max(1, np.sum(predicted == c))
        recall = right / np.sum(tested.label == c)
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        found[int(c)] = precision, recall, f1
    return found


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_scores(seed):
    tested = outputs(seed)
    found, expected = scores(tested), by_definition(tested)
    assert found['macro_top1'] == pytest.approx(np.mean([r for _, r, _ in expected.values()]))
    assert found['macro_f1'] == pytest.approx(np.mean([f for _, _, f in expected.values()]))
    ranks = (tested.logits > tested.logits[np.arange(COUNT), tested.label][:, None]).sum(1)
    assert found['top5'] == pytest.approx(np.mean(ranks < 5))
    assert found['top1'] == pytest.approx(np.mean(ranks < 1))
    rows = class_rows(tested, [f'c{c}' for c in range(CLASSES)])
    for c, row in enumerate(rows):
        assert row['images'] == np.sum(tested.label == c)
        values = row['precision'], row['recall'], row['f1']
        if c in expected:
            assert values == pytest.approx(expected[c])
    assert 'top5' not in scores(outputs(seed, classes=10))


def test_classes_without_test_images_do_not_count():
    tested = outputs(0, label=np.repeat([0, 3], 20))
    expected = by_definition(tested)
    assert len(expected) == 2
    assert scores(tested)['macro_top1'] == pytest.approx(
        np.mean([r for _, r, _ in expected.values()])
    )


def records(classes):
    images = np.zeros((COUNT + 5, 4, 4), np.uint8)
    names = [f'class, "{c}"' for c in range(classes)]
    return Records.from_arrays(images, np.arange(COUNT + 5) % classes, names)


def read(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_files(tmp_path):
    tested, data = outputs(1, 3), records(3)
    # As if some images could not be read; `index` counts all records.
    tested = evaluation.Tested(tested.logits, tested.label, np.arange(COUNT) + 5)
    write_scores(tmp_path, tested, data)
    predicted = tested.logits.argmax(1)
    names = data.class_names
    for row, c in zip(read(tmp_path / 'per_class.csv'), range(3), strict=True):
        wrong = [int(np.sum((tested.label == c) & (predicted == o)) * (o != c)) for o in range(3)]
        assert (row['class'], int(row['confused'])) == (names[c], max(wrong))
        assert row['most_confused_with'] == names[int(np.argmax(wrong))]
    for c, row in enumerate(read(tmp_path / 'confusion.csv')):
        assert row.pop('true class') == names[c]
        expected = [np.sum((tested.label == c) & (predicted == o)) for o in range(3)]
        assert [int(row[name]) for name in names] == expected
    rows = read(tmp_path / 'predictions.csv')
    assert [row['image'] for row in rows] == [f'image {i + 5} of arrays' for i in range(COUNT)]
    for row, logits, label in zip(rows, tested.logits, tested.label, strict=True):
        assert (row['class'], row['predicted']) == (names[label], names[logits.argmax()])
        probabilities = [float(row[name]) for name in names]
        np.testing.assert_allclose(probabilities, softmax(logits), rtol=1e-4)


def test_many_classes_have_their_best_alone(tmp_path):
    write_scores(tmp_path, outputs(2, 201), records(201))
    row = read(tmp_path / 'predictions.csv')[0]
    assert len(row) == 3 + 10
    assert row['class1'] == row['predicted']
    values = [float(row[f'probability{i}']) for i in range(1, 6)]
    assert values == sorted(values, reverse=True)
