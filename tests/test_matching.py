import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmixup_jax.errors import ConfigError
from xmixup_jax.matching import assign, class_similarity


def similarities(rows=(2, 4), columns=(4, 6)):
    shapes = st.tuples(st.integers(*rows), st.integers(*columns))
    values = st.floats(-1, 1, allow_nan=False, width=32)
    return shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=values))


def test_cosine_and_euclidean_against_numpy():
    rng = np.random.default_rng(0)
    t, s = rng.random((3, 7)), rng.random((5, 7))
    cosine = (t / np.linalg.norm(t, axis=1)[:, None]) @ (s / np.linalg.norm(s, axis=1)[:, None]).T
    np.testing.assert_allclose(class_similarity(t, s, 'cosine'), cosine, atol=1e-12)
    euclidean = -np.sqrt(((t[:, None] - s[None]) ** 2).sum(-1))
    np.testing.assert_allclose(class_similarity(t, s, 'euclidean'), euclidean, atol=1e-12)


@given(similarities())
def test_optimal_reaches_the_best_total_of_all_one_to_one_assignments(similarity):
    rows, columns = similarity.shape
    best = max(
        sum(similarity[i, c] for i, c in enumerate(choice))
        for choice in itertools.permutations(range(columns), rows)
    )
    match = assign(similarity, 'optimal')
    assert len(match.selected) == rows
    np.testing.assert_allclose(match.similarity.sum(), best, atol=1e-5)


@given(similarities())
def test_least_is_optimal_for_the_opposite(similarity):
    match = assign(similarity, 'least')
    assert len(match.selected) == len(similarity)
    best = assign(-similarity, 'optimal').similarity.sum()
    np.testing.assert_allclose(match.similarity.sum(), -best, atol=1e-5)


@given(similarities(rows=(2, 2), columns=(4, 5)))
def test_optimal_with_two_classes_for_each_target(similarity):
    columns = similarity.shape[1]
    best = max(
        similarity[0, list(choice[:2])].sum() + similarity[1, list(choice[2:])].sum()
        for choice in itertools.permutations(range(columns), 4)
    )
    match = assign(similarity, 'optimal', classes_per_target=2)
    assert match.classes.shape == (2, 2)
    assert len(match.selected) == 4
    np.testing.assert_allclose(match.similarity.sum(), best, atol=1e-5)


@given(similarities())
def test_greedy_takes_the_best_pair_left(similarity):
    left = similarity.copy()
    expected = np.full(len(left), -1)
    for _ in range(len(left)):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        expected[row] = column
        left[row], left[:, column] = -np.inf, -np.inf
    match = assign(similarity, 'greedy')
    chosen = similarity[np.arange(len(left)), expected]
    np.testing.assert_allclose(match.similarity[:, 0], chosen, atol=1e-6)
    assert len(match.selected) == len(left)


def test_greedy_is_not_optimal():
    similarity = np.array([[0.9, 0.8], [0.8, 0.1]])
    assert assign(similarity, 'greedy').classes.ravel().tolist() == [0, 1]
    assert assign(similarity, 'optimal').classes.ravel().tolist() == [1, 0]


def test_nearest_may_repeat_and_sorts_by_similarity():
    match = assign(np.array([[0.1, 0.9, 0.5], [0.2, 0.8, 0.3]]), 'nearest', classes_per_target=2)
    assert match.classes.tolist() == [[1, 2], [1, 2]]
    np.testing.assert_allclose(match.similarity, [[0.9, 0.5], [0.8, 0.3]], atol=1e-6)


@given(similarities(), st.integers(0, 100))
def test_random_is_one_to_one_and_follows_its_seed(similarity, seed):
    match = assign(similarity, 'random', seed=seed)
    assert len(match.selected) == len(similarity)
    np.testing.assert_array_equal(match.classes, assign(similarity, 'random', seed=seed).classes)
    rows = np.arange(len(similarity))
    np.testing.assert_allclose(
        match.similarity[:, 0], similarity[rows, match.classes[:, 0]], atol=1e-6
    )


@pytest.mark.parametrize('kind', ['optimal', 'greedy', 'least'])
def test_one_to_one_needs_enough_source_classes(kind):
    with pytest.raises(ConfigError, match=r'assignment=nearest'):
        assign(np.zeros((3, 2)), kind)
