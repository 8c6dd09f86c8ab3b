"""Where two methods differ: the classes and test images that one gets right and the other wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

CLASSES, IMAGES = 10, 16  # won, and as many lost, shown at most


@dataclass(frozen=True)
class Predictions:
    """A network's predictions for N different test images."""

    number: np.ndarray
    """int64 [N], record numbers in their split."""
    label: np.ndarray
    """int [N], the true classes."""
    predicted: np.ndarray
    """int [N], the most probable classes."""
    probability: np.ndarray
    """float64 [N], of the predicted classes."""

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.predicted == self.label

    def select(self, positions: np.ndarray) -> 'Predictions':
        """The predictions at these positions."""
        columns = (self.number, self.label, self.predicted, self.probability)
        return Predictions(*(column[positions] for column in columns))


class Pair(NamedTuple):
    """Two networks' predictions for the same images, row by row."""

    first: Predictions
    second: Predictions


def paired(first: Predictions, second: Predictions) -> Pair:
    """The predictions for the images that both networks have seen, by ascending record number."""
    _, i, j = np.intersect1d(first.number, second.number, assume_unique=True, return_indices=True)
    return Pair(first.select(i), second.select(j))


class Counts(NamedTuple):
    """Numbers of images by who is right."""

    both: int
    first: int
    """Only the first network."""
    second: int
    """Only the second network."""
    neither: int

    @property
    def p_value(self) -> float:
        """The exact p value of McNemar's test, two-sided.

        Under the null hypothesis, an image on which only one network is right is as likely the
        first one's as the second one's. McNemar, Psychometrika 12, 1947; Dietterich, Neural
        Computation 10, 1998, section 3.1.

        >>> Counts(both=90, first=1, second=7, neither=2).p_value
        0.0703125
        """
        discordant = self.first + self.second
        return float(binomtest(self.first, discordant).pvalue) if discordant else 1.0


def counts(pair: Pair) -> Counts:
    """Counts the images by who is right."""
    a, b = pair.first.right, pair.second.right
    return Counts(*(int(np.sum(each)) for each in (a & b, a & ~b, ~a & b, ~a & ~b)))


class ClassChange(NamedTuple):
    """A class's recall in two methods, averaged over the seeds."""

    label: int
    images: float
    """Test images, mean over the seeds."""
    first: float
    second: float
    """Recall, 0 to 1."""
    difference: float
    """That of the second method minus that of the first."""
    better: int
    """Seeds with which the second method is better."""
    worse: int


def class_changes(pairs: Sequence[Pair], num_classes: int) -> list[ClassChange]:
    """The changes of all classes that have test images, the largest gain first.

    Args:
      pairs: one for each seed; a class counts with the seeds that have test images of it.
      num_classes: K.
    """
    seen = np.array([np.bincount(p.first.label, minlength=num_classes) for p in pairs])
    right = np.array(
        [[np.bincount(a.label[a.right], minlength=num_classes) for a in p] for p in pairs]
    )
    changes = []
    for c in np.flatnonzero(seen.sum(axis=0)):
        there = seen[:, c] > 0
        first, second = (right[there, :, c] / seen[there, c, None]).T
        changes.append(
            ClassChange(
                label=int(c),
                images=float(seen[there, c].mean()),
                first=float(first.mean()),
                second=float(second.mean()),
                # Seeds that cancel out leave no rest of rounding, which would look like a loss.
                difference=round(float((second - first).mean()), 12),
                better=int((second > first).sum()),
                worse=int((second < first).sum()),
            )
        )
    return sorted(changes, key=lambda change: -change.difference)


class ImageChanges(NamedTuple):
    """M images that were tested with one seed or several."""

    number: np.ndarray
    """int64 [M], record numbers, ascending."""
    label: np.ndarray
    """int [M], the true classes."""
    tests: np.ndarray
    """int [M], seeds with which the image was tested."""
    right: np.ndarray
    """int [2, M], seeds with which each method is right."""
    confidence: np.ndarray
    """float64 [2, M], mean probability of the right predictions; 0 where there are none."""

    @property
    def won(self) -> np.ndarray:
        """Places of the images that the second method gets right with more than half of the seeds,
        and the first one with less than half; the clearest first."""
        return self._gained(1)

    @property
    def lost(self) -> np.ndarray:
        """The same the other way round."""
        return self._gained(0)

    def _gained(self, winner: int) -> np.ndarray:
        more, less = self.right[winner], self.right[1 - winner]
        places = np.flatnonzero((2 * more > self.tests) & (2 * less < self.tests))
        share = ((more - less) / self.tests)[places]
        return places[np.lexsort((-self.confidence[winner][places], -share))]


def image_changes(pairs: Sequence[Pair]) -> ImageChanges:
    """What two methods make of each image.

    Args:
      pairs: one for each seed.
    """
    number, first_place, place, tests = np.unique(
        np.concatenate([pair.first.number for pair in pairs]),
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    label = np.concatenate([pair.first.label for pair in pairs])[first_place]
    right, confidence = [], []
    for predictions in zip(*pairs, strict=True):
        hit = np.concatenate([each.right for each in predictions])
        probability = np.concatenate([each.probability for each in predictions])
        hits = np.bincount(place, hit, minlength=len(number)).astype(np.int64)
        total = np.bincount(place, hit * probability, minlength=len(number))
        right.append(hits)
        confidence.append(total / np.maximum(1, hits))
    return ImageChanges(number, label, tests, np.array(right), np.array(confidence))


class Usual(NamedTuple):
    """A method's most frequent prediction for an image."""

    predicted: int
    probability: float
    """Mean over the seeds that gave this prediction."""
    given: int
    """Those seeds."""
    tests: int
    """All seeds with which the image was tested."""


def usual_prediction(predictions: Sequence[Predictions], number: int, wrong: bool = False) -> Usual:
    """The most frequent prediction for an image; of equally frequent ones, the most confident.

    Args:
      predictions: of a method, one for each seed.
      number: of the record; at least one of them has it.
      wrong: whether right predictions are left out; at least one must be wrong.
    """
    found: dict[int, list[float]] = {}
    tests = 0
    for each in predictions:
        for i in np.flatnonzero(each.number == number):
            tests += 1
            if not (wrong and each.right[i]):
                found.setdefault(int(each.predicted[i]), []).append(float(each.probability[i]))
    predicted, given = max(found.items(), key=lambda item: (len(item[1]), np.mean(item[1])))
    return Usual(predicted, float(np.mean(given)), len(given), tests)


def differences_part(
    pairs: Mapping[int, Pair],
    methods: tuple[str, str],
    class_names: Sequence[str],
    picture: Callable[[int], str | None],
) -> dict[str, Any]:
    """The values of the macro in differences.html.

    Args:
      pairs: the predictions by seed.
      methods: what to call the two.
      class_names: K names, for people.
      picture: record number to a thumbnail as a data URI, or None; called for 2 x IMAGES at most.
    """
    both = list(pairs.values())
    changes = class_changes(both, len(class_names))
    won = [change for change in changes if change.difference > 0]
    lost = [change for change in reversed(changes) if change.difference < 0]
    images = image_changes(both)

    def line(winner: int, method: int, number: int) -> dict[str, str]:
        usual = usual_prediction([pair[method] for pair in both], number, wrong=method != winner)
        often = f', {usual.given}/{usual.tests}' if len(both) > 1 else ''
        words = f'{class_names[usual.predicted]} ({usual.probability:.0%}{often})'
        return {'method': methods[method], 'words': words}

    def cards(winner: int, places: np.ndarray) -> list[dict[str, Any]]:
        found = [
            {
                'uri': picture(int(images.number[i])),
                'name': class_names[images.label[i]],
                'lines': [line(winner, method, int(images.number[i])) for method in (0, 1)],
            }
            for i in places[:IMAGES]
        ]
        return [card for card in found if card['uri']]

    tables = {seed: counts(pair) for seed, pair in pairs.items()}
    return {
        'methods': methods,
        'seeds': [
            {'seed': seed, 'counts': list(table), 'p': f'{table.p_value:.2g}'}
            for seed, table in tables.items()
        ],
        'classes': [_classes('won', won, class_names), _classes('lost', lost, class_names)],
        'images': [
            {'kind': kind, 'count': len(places), 'cards': cards(winner, places)}
            for kind, winner, places in (('won', 1, images.won), ('lost', 0, images.lost))
        ],
    }


def _classes(
    kind: str, changes: Sequence[ClassChange], class_names: Sequence[str]
) -> dict[str, Any]:
    rows = [
        {
            'name': class_names[change.label],
            'images': f'{change.images:.0f}',
            'recalls': [f'{100 * change.first:.1f}', f'{100 * change.second:.1f}'],
            'difference': f'{100 * change.difference:+.1f}',
            'seeds': change.better if kind == 'won' else change.worse,
        }
        for change in changes[:CLASSES]
    ]
    return {'kind': kind, 'count': len(changes), 'rows': rows}
