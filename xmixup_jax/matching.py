"""Class matching: which source classes serve as auxiliary samples for which target class.

The paper (arXiv 2007.10252) selects, "for every class of the target task", auxiliary samples
from the source; similarity and assignment are options of this project.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from xmixup_jax.errors import ConfigError

# The first three are those of `class_similarity`; 'predicted' is `features.predicted_similarity`.
SIMILARITIES = ('cosine', 'euclidean', 'emd', 'predicted')
ASSIGNMENTS = ('optimal', 'greedy', 'nearest', 'random', 'least')
ONE_TO_ONE = ('optimal', 'greedy', 'least')
EMD_GAMMA = 0.01


class ClassMatch(NamedTuple):
    """The outcome of matching K_t target classes with k source classes each."""

    classes: np.ndarray
    """int32 [K_t, k], source class indices, the most similar first."""
    similarity: np.ndarray
    """float32 [K_t, k], their similarities."""

    @property
    def selected(self) -> np.ndarray:
        """int32 [K_s], the distinct source classes in ascending order."""
        return np.unique(self.classes)


def match_classes(
    target_means: np.ndarray,
    source_means: np.ndarray,
    similarity: str = 'cosine',
    assignment: str = 'optimal',
    classes_per_target: int = 1,
    seed: int = 0,
) -> ClassMatch:
    """Gives each target class the source classes that resemble it.

    For other similarities than those of class means, see `assign`.

    Args:
      target_means: [K_t, D] and source_means: [K_s, D], mean features of the classes.
      similarity: see `class_similarity`.
      assignment, classes_per_target, seed: see `assign`.

    Raises:
      ConfigError: a one-to-one assignment with more target than source classes.

    >>> match = match_classes(np.eye(2), np.array([[0.0, 1.0], [0.6, 0.8], [0.9, 0.1]]))
    >>> match.classes.tolist()
    [[2], [0]]
    """
    alike = class_similarity(target_means, source_means, similarity)
    return assign(alike, assignment, classes_per_target, seed)


def class_similarity(target_means: np.ndarray, source_means: np.ndarray, kind: str) -> np.ndarray:
    """Similarity of every target class with every source class; larger is more alike.

    Args:
      target_means: [K_t, D] and source_means: [K_s, D], mean penultimate features.
      kind: 'cosine' (cosine of the means), 'euclidean' (minus their distance d) or 'emd'
        (exp(-0.01 d), Cui et al., CVPR 2018: the earth mover's distance between two
        domains of one class each is the distance of their means).

    Returns:
      float64 [K_t, K_s].
    """
    metric = 'cosine' if kind == 'cosine' else 'euclidean'
    distance = cdist(
        np.asarray(target_means, np.float64), np.asarray(source_means, np.float64), metric
    )
    if kind == 'emd':
        return np.exp(-EMD_GAMMA * distance)
    return 1.0 - distance if kind == 'cosine' else -distance


def domain_similarity(
    target_means: np.ndarray, target_counts: np.ndarray, source_means: np.ndarray
) -> np.ndarray:
    """Similarity of each single source class with the whole target domain.

    Cui et al., CVPR 2018, section 4: exp(-0.01 d), d the earth mover's distance between the
    source class, all its mass at its mean, and the target's class means, each with the class's
    share of the images. From one point there is but one flow: d = sum_t share_t ||s - t||.

    Args:
      target_means: [K_t, D] and source_means: [K_s, D], mean penultimate features.
      target_counts: [K_t], images of each target class.

    Returns:
      float64 [K_s].
    """
    shares = target_counts / target_counts.sum()
    distance = cdist(np.asarray(source_means, np.float64), np.asarray(target_means, np.float64))
    return np.exp(-EMD_GAMMA * (distance @ shares))


def check_assignment(kind: str, num_target: int, num_source: int, classes_per_target: int) -> None:
    """Raises ConfigError where `assign` has no solution for these numbers of classes."""
    if kind in ONE_TO_ONE and num_target * classes_per_target > num_source:
        raise ConfigError(
            f'config.match.assignment={kind} is one-to-one and needs at least '
            f'{num_target} x {classes_per_target} source classes, but the source has {num_source}: '
            'use --config.match.assignment=nearest'
        )
    if classes_per_target > num_source:
        raise ConfigError(
            f'config.match.classes_per_target={classes_per_target} is more than the '
            f"source's {num_source} classes: use --config.match.classes_per_target={num_source} "
            'at most'
        )


def assign(
    similarity: np.ndarray, kind: str, classes_per_target: int = 1, seed: int = 0
) -> ClassMatch:
    """Gives each target class its source classes.

    Args:
      similarity: [K_t, K_s].
      kind: `optimal`, no source class used twice, largest total similarity (Hungarian);
        `greedy`, likewise, but always the most similar pair left; `nearest`, each target's most
        similar classes, which targets may share; `random`, regardless of similarity, without
        sharing as long as the source has enough classes; `least`, as `optimal`, but with the
        smallest total similarity (ablation).
      classes_per_target: k, source classes for each target class.
      seed: for `random` only.

    Raises:
      ConfigError: a one-to-one assignment with more target than source classes.
    """
    num_target, num_source = similarity.shape
    k = classes_per_target
    check_assignment(kind, num_target, num_source, k)
    if kind in ('optimal', 'least'):
        rows, columns = linear_sum_assignment(np.repeat(similarity, k, axis=0), kind == 'optimal')
        classes = columns[np.argsort(rows, kind='stable')].reshape(num_target, k)
    elif kind == 'greedy':
        classes = _greedy(similarity, k)
    elif kind == 'nearest':
        classes = np.argsort(-similarity, axis=1, kind='stable')[:, :k]
    elif kind == 'random':
        classes = _random(num_target, num_source, k, np.random.default_rng(seed))
    else:
        raise ValueError(f'assignment must be one of {ASSIGNMENTS}, not {kind!r}')
    chosen = np.take_along_axis(similarity, classes, axis=1)
    order = np.argsort(-chosen, axis=1, kind='stable')
    return ClassMatch(
        np.take_along_axis(classes, order, axis=1).astype(np.int32),
        np.take_along_axis(chosen, order, axis=1).astype(np.float32),
    )


def _greedy(similarity: np.ndarray, k: int) -> np.ndarray:
    taken: list[list[int]] = [[] for _ in similarity]
    free = np.ones(similarity.shape[1], bool)
    for flat in np.argsort(-similarity, axis=None, kind='stable'):
        row, column = np.unravel_index(flat, similarity.shape)
        if free[column] and len(taken[row]) < k:
            taken[row].append(column)
            free[column] = False
    return np.array(taken)


def _random(num_target: int, num_source: int, k: int, rng: np.random.Generator) -> np.ndarray:
    if num_target * k <= num_source:
        return rng.permutation(num_source)[: num_target * k].reshape(num_target, k)
    return np.stack([rng.permutation(num_source)[:k] for _ in range(num_target)])
