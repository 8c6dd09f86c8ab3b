"""Class matching: chooses the source classes whose images are mixed into each target class.

The XMixup paper (https://arxiv.org/abs/2007.10252) selects auxiliary samples from the source "for
every class of the target task". The similarities and assignments here are options of this project.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from xmixup_jax.errors import ConfigError

# `class_similarity` computes the first three, `features.predicted_similarity` the last one.
SIMILARITIES = ('cosine', 'euclidean', 'emd', 'predicted')
ASSIGNMENTS = ('optimal', 'greedy', 'nearest', 'random', 'least')
ONE_TO_ONE = ('optimal', 'greedy', 'least')
EMD_GAMMA = 0.01


class ClassMatch(NamedTuple):
    """The source classes of each target class: k for each of K_t."""

    classes: np.ndarray
    """int32 [K_t, k], indices of source classes, the most similar first."""
    similarity: np.ndarray
    """float32 [K_t, k], the similarities of these classes."""

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
    """Assigns similar source classes to each target class, by the mean features of the classes.

    To use other similarities, call `assign`.

    Args:
      target_means: [K_t, D], mean features of the target classes.
      source_means: [K_s, D], mean features of the source classes.
      similarity: see `class_similarity`.
      assignment, classes_per_target, seed: see `assign`.

    Raises:
      ConfigError: there are too few source classes, see `check_assignment`.

    >>> match = match_classes(np.eye(2), np.array([[0.0, 1.0], [0.6, 0.8], [0.9, 0.1]]))
    >>> match.classes.tolist()
    [[2], [0]]
    """
    alike = class_similarity(target_means, source_means, similarity)
    return assign(alike, assignment, classes_per_target, seed)


def class_similarity(target_means: np.ndarray, source_means: np.ndarray, kind: str) -> np.ndarray:
    """Computes the similarity of every target class to every source class.

    Args:
      target_means: [K_t, D], mean penultimate features.
      source_means: [K_s, D], mean penultimate features.
      kind: 'cosine' of the means; 'euclidean', minus their distance d; or 'emd', exp(-0.01 d).
        The last is from Cui et al., CVPR 2018, https://arxiv.org/abs/1806.06193: the earth mover's
        distance of two domains with one class each is the distance of their means.

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
    """Computes the similarity of each source class to the whole target domain.

    It is exp(-0.01 d) of Cui et al., CVPR 2018, section 4 (https://arxiv.org/abs/1806.06193). d is
    the earth mover's distance between the mean s of the source class, which has all mass, and the
    means t of the target classes, each weighted by its share of the images. From a single point
    there is only one flow, so d = sum_t share_t ||s - t||.

    Args:
      target_means: [K_t, D], mean penultimate features.
      target_counts: [K_t], number of images in each target class.
      source_means: [K_s, D], mean penultimate features.

    Returns:
      float64 [K_s].
    """
    shares = target_counts / target_counts.sum()
    distance = cdist(np.asarray(source_means, np.float64), np.asarray(target_means, np.float64))
    return np.exp(-EMD_GAMMA * (distance @ shares))


def check_assignment(kind: str, num_target: int, num_source: int, classes_per_target: int) -> None:
    """Raises ConfigError if `assign` has no solution for these numbers of classes."""
    if kind in ONE_TO_ONE and num_target * classes_per_target > num_source:
        raise ConfigError(
            f'config.match.assignment={kind} is one-to-one and needs at least '
            f'{num_target} x {classes_per_target} source classes, but the source has {num_source}: '
            'use --config.match.assignment=nearest'
        )
    if classes_per_target > num_source:
        raise ConfigError(
            f'config.match.classes_per_target={classes_per_target} is more than the {num_source} '
            f'classes of the source: use at most --config.match.classes_per_target={num_source}'
        )


def assign(
    similarity: np.ndarray, kind: str, classes_per_target: int = 1, seed: int = 0
) -> ClassMatch:
    """Assigns source classes to each target class.

    Args:
      similarity: [K_t, K_s].
      kind: one of
        'optimal': one-to-one, with the largest total similarity (Hungarian algorithm);
        'greedy': one-to-one, repeatedly taking the most similar pair that is left;
        'nearest': the most similar classes of each target class, which others may share;
        'random': regardless of similarity; one-to-one if the source has enough classes;
        'least': one-to-one, with the smallest total similarity (an ablation).
      classes_per_target: k, the number of source classes for each target class.
      seed: for 'random'.

    Raises:
      ConfigError: there are too few source classes, see `check_assignment`.
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
