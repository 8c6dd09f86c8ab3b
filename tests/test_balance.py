"""Label smoothing, class weights and balanced sampling, against PyTorch and scikit-learn."""

import contextlib
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.utils.class_weight import compute_class_weight

from tests.method_checks import LABELS, LABELS_T, B, K, check, make_view, normal, outputs
from xmixup_jax.checks import validate
from xmixup_jax.data.balance import CLASS_WEIGHTS, class_weights
from xmixup_jax.data.pairing import pair_records
from xmixup_jax.errors import ConfigError
from xmixup_jax.matching import match_classes
from xmixup_jax.methods import METHODS
from xmixup_jax.mixing import class_cross_entropy, mixed_cross_entropy
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import train_and_evaluate

WEIGHTS = np.array([0.5, 1.0, 2.0, 0.25], np.float32)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.6])
@pytest.mark.parametrize('weights', [None, WEIGHTS])
def test_cross_entropy_is_pytorchs(smoothing, weights):
    weight = None if weights is None else torch.tensor(weights)
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction='none')
    check(
        lambda logits: class_cross_entropy(logits, LABELS, smoothing, weights).mean(),
        lambda logits: loss(logits, LABELS_T).mean(),
        normal(B, K),
    )


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
@pytest.mark.parametrize('weights', [None, WEIGHTS])
def test_mixed_labels_are_pytorchs_soft_labels(smoothing, weights):
    """The soft labels cover target and source classes; source classes have weight 1."""
    sources, lam = 3, np.linspace(0.5, 1, B, dtype=np.float32)
    source_labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    soft = np.zeros((B, K + sources), np.float32)
    soft[np.arange(B), LABELS] = lam
    soft[np.arange(B), K + source_labels] = 1 - lam
    weight = None if weights is None else torch.tensor([*weights, *[1.0] * sources])
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction='none')

    def ours(logits):
        values = mixed_cross_entropy(
            logits, LABELS, source_labels, lam, 'joint', K, smoothing, weights
        )
        return values.mean()

    check(ours, lambda logits: loss(logits, torch.tensor(soft)).mean(), normal(B, K + sources))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array))
def test_inverse_weights_are_scikit_learns_balanced_ones(labels):
    present = np.unique(labels)
    expected = compute_class_weight('balanced', classes=present, y=labels)
    # In scikit-learn, too, the mean weight of the images is 1.
    found = class_weights(labels, 4, 'inverse', 0.0)[present]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array))
def test_effective_number_of_images(labels):
    """E(n) = 1 + beta E(n - 1): the recursion that the paper derives its formula from."""
    beta = 0.9

    def effective(n):
        return 1 + beta * effective(n - 1) if n > 1 else 1.0

    counts = np.maximum(np.bincount(labels, minlength=4), 1)
    weights = np.array([1 / effective(n) for n in counts])
    found = class_weights(labels, 4, 'effective', beta)
    np.testing.assert_allclose(found / found[0], weights / weights[0], rtol=1e-5)
    assert found[labels].mean() == pytest.approx(1, rel=1e-5)


def test_balanced_sampling_draws_classes_and_images_alike():
    labels = np.repeat([0, 1, 2], [2, 10, 88])
    match = match_classes(np.eye(3), np.eye(3))
    drawn = pair_records(labels, np.arange(3), match, seed=1, balanced=True)
    elements = [drawn[i] for i in range(6000)]
    places = Counter(int(each['target']) for each in elements)
    for c in range(3):
        counts = [places[i] for i in np.flatnonzero(labels == c)]
        assert abs(sum(counts) - 2000) < 4 * np.sqrt(6000 * 2 / 9)
        assert chisquare(counts).pvalue > 1e-3
    assert all(each['source'] == labels[each['target']] for each in elements)
    again = pair_records(labels, np.arange(3), match, seed=1, balanced=True)
    assert [int(again[i]['target']) for i in range(50)] == [int(e['target']) for e in elements[:50]]
    assert len({int(each['seed']) for each in elements}) > 5990


@pytest.mark.parametrize('method', ['finetune', 'mixup', 'cutmix', 'xmixup'])
def test_losses_follow_the_configuration(method):
    """The cross-entropy of finetune is part of the loss of all other methods."""
    batch = {
        'label': jnp.asarray(LABELS),
        'other_label': jnp.asarray(LABELS[::-1]),
        'source_label': jnp.zeros(B, jnp.int32),
        'lam': jnp.ones(B),
    }
    logits = normal(B, K + (method == 'xmixup'))

    def loss(**changes):
        view = make_view(method, batch=batch, outputs=outputs(jnp.asarray(logits)))
        view.config.update(changes.pop('config', {}))
        return float(METHODS[method].loss(view._replace(**changes)))

    def expected(weight=None, **options):
        if weight is not None:
            weight = torch.tensor([*weight, *[1.0] * (method == 'xmixup')])
        each = torch.nn.CrossEntropyLoss(weight, reduction='none', **options)
        return float(each(torch.tensor(logits), LABELS_T).mean())

    assert loss() == pytest.approx(expected(), rel=1e-5)
    smoothed = loss(config={'label_smoothing': 0.3})
    assert smoothed == pytest.approx(expected(label_smoothing=0.3), rel=1e-5)
    weighted = loss(class_weights=jnp.asarray(WEIGHTS))
    assert weighted == pytest.approx(expected(WEIGHTS), rel=1e-5)


def test_a_run_weighs_its_own_training_images(config, tmp_path):
    """The class weights are constants of the run, so a resumed run has them too."""
    config.method, config.balance.weights = 'finetune', 'inverse'
    config.target.shots, config.target.sample_rate = 0, 0.02
    train_and_evaluate(config, tmp_path)
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        constants = checkpoints.restore_constants(checkpoints.restore_meta())
    data = open_data(config).target
    expected = compute_class_weight('balanced', classes=np.arange(10), y=data.labels)
    np.testing.assert_allclose(constants[CLASS_WEIGHTS], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'balance.sampling': 'no'}, 'must be one of natural, balanced'),
        ({'balance.weights': 'no'}, 'must be one of none, inverse, effective'),
        ({'balance.beta': 1.0}, 'from 0 to below 1'),
        ({'label_smoothing': 1.0}, 'from 0 to below 1'),
        ({'balance.sampling': 'balanced', 'balance.weights': 'inverse'}, 'use one of them'),
    ],
)
def test_impossible_choices_are_refused(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
