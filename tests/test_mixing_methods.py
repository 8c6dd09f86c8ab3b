"""Co-Train, mixup, CutMix and SMILE, against PyTorch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from tests.method_checks import (
    CLOSE,
    K_0,
    LABELS,
    LABELS_T,
    B,
    K,
    check,
    make_view,
    normal,
    on_batch_axis,
    outputs,
)
from xmixup_jax import mixing
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS, cutmix, smile
from xmixup_jax.models import BatchNorm, create_model, forward
from xmixup_jax.step import TrainState


def test_cotrain():
    source_label = np.array([2, 0, 1, 1, 0, 2])

    def ours(logits):
        batch = {'label': jnp.asarray(LABELS), 'source_label': jnp.asarray(source_label)}
        view = make_view('cotrain', outputs=outputs(logits), batch=batch)
        view.config.cotrain.weight = 0.7
        return METHODS['cotrain'].loss(view)

    def theirs(logits):
        target, source = logits[:B, :K], logits[B:, K:]
        return F.cross_entropy(target, LABELS_T) + 0.7 * F.cross_entropy(
            source, torch.tensor(source_label)
        )

    check(ours, theirs, normal(2 * B, K + 3))


LAM = np.random.default_rng(1).random(B).astype(np.float32)
OTHER = np.roll(LABELS, 1)
MIXED = {'label': LABELS, 'other_label': OTHER, 'lam': LAM}


def mixed(logits):
    each = [
        F.cross_entropy(logits[:, :K], torch.tensor(y).long(), reduction='none')
        for y in (LABELS, OTHER)
    ]
    return (torch.tensor(LAM) * each[0] + (1 - torch.tensor(LAM)) * each[1]).mean()


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_loss_of_two_labels(name):
    batch = {key: jnp.asarray(value) for key, value in MIXED.items()}
    check(
        lambda z: METHODS[name].loss(make_view(name, outputs=outputs(z), batch=batch)),
        mixed,
        normal(B, K),
    )


def batch_of_images(size=10):
    return {'image': normal(B, size, size, 3), 'label': LABELS}


def transformed(name, **changes):
    config = digits.get_config()
    config[name].update(changes)
    keys = jax.random.split(jax.random.key(3), B)
    transform = on_batch_axis(lambda batch: METHODS[name].transform(config, keys, batch))
    batch = batch_of_images()
    return batch, jax.tree.map(np.asarray, transform(batch))


@pytest.mark.parametrize('name', ['mixup', 'smile'])
def test_mixup_meets_the_record_before(name):
    before, after = transformed(name, alpha=1.0)
    lam = after['lam'][:, None, None, None]
    partner = np.roll(before['image'], 1, axis=0)
    np.testing.assert_allclose(after['image'], lam * before['image'] + (1 - lam) * partner, **CLOSE)
    np.testing.assert_array_equal(after['other_label'], OTHER)
    assert len(np.unique(after['lam'])) == B


def test_cutmix_pastes_one_box_and_weights_by_its_area():
    before, after = transformed('cutmix', alpha=1.0)
    partner = np.roll(before['image'], 1, axis=0)
    pasted = (after['image'] == partner).all(-1)
    kept = (after['image'] == before['image']).all(-1)
    assert np.array_equal(pasted, ~kept) and pasted.any() and kept.any()
    np.testing.assert_allclose(after['lam'], 1 - pasted.mean((1, 2)), rtol=1e-6)
    for mask in pasted:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None])  # a rectangle
        assert (np.diff(np.flatnonzero(rows)) == 1).all() and (
            np.diff(np.flatnonzero(columns)) == 1
        ).all()


@given(st.integers(0, 1000), st.floats(0, 1, width=32), st.sampled_from((7, 32)))
def test_cutmix_box_area(seed, lam, size):
    """The side is size * sqrt(1 - lam), up to rounding and the border."""
    mask = jax.jit(cutmix.box_mask, static_argnums=2)(jax.random.key(seed), lam, size)
    area = float(mask.sum())
    side = size * np.sqrt(1 - lam)
    assert np.floor(side / 2 - 1).clip(0) ** 2 <= area <= (side + 1) ** 2


def test_smile():
    maps, teacher_maps = normal(B, 2, 2, 3), normal(B, 2, 2, 3, seed=1)
    probabilities = scipy.special.softmax(normal(B, K_0), axis=1).astype(np.float32)
    lam = LAM[:, None]
    soft = lam * probabilities + (1 - lam) * np.roll(probabilities, 1, axis=0)
    batch = {key: jnp.asarray(value) for key, value in MIXED.items()}
    # What `teach` makes of a teacher with these outputs.
    logits = np.pad(np.log(probabilities), ((0, 0), (K, 0)))
    view = make_view(
        'smile',
        batch=batch | {'unmixed': None},
        network=lambda *_: outputs(logits, stages=(teacher_maps,)),
        memory={'params': None},
        constants={'batch_stats': None},
    )
    taught = jax.vmap(lambda _: smile.teach(view), axis_name='batch')(jnp.zeros(1))
    taught = jax.tree.map(lambda x: x[0], taught)
    np.testing.assert_allclose(taught['probabilities'], soft, **CLOSE)
    lam = LAM[:, None, None, None]
    target = lam * teacher_maps + (1 - lam) * np.roll(teacher_maps, 1, axis=0)
    np.testing.assert_allclose(taught['maps'], target, **CLOSE)

    def ours(z, maps):
        seen = make_view('smile', batch=batch, taught=taught, outputs=outputs(z, stages=(maps,)))
        seen.config.smile.feature_weight = 0.3
        return smile.loss(seen)

    def theirs(z, maps):
        source = -(torch.tensor(soft) * F.log_softmax(z[:, K:], dim=1)).sum(1).mean()
        distance = torch.norm(maps - torch.tensor(target)) / 4
        return mixed(z) + 0.3 * distance + 0.1 * source

    check(ours, theirs, normal(B, K + K_0), maps)


def test_smile_teacher_follows_the_backbone_and_keeps_its_head():
    params = {'conv1': jnp.ones(2), 'fc': {'kernel': jnp.ones(2)}}
    teacher = {'params': jax.tree.map(jnp.zeros_like, params)}
    state = TrainState(jnp.asarray(1), params, {}, {}, teacher)
    memory = smile.after_step(make_view('smile'), state).memory['params']
    np.testing.assert_allclose(memory['conv1'], 0.001, rtol=1e-5)
    np.testing.assert_array_equal(memory['fc']['kernel'], 0)


def test_neighbour_goes_around_the_whole_batch():
    values = np.arange(12).reshape(4, 3)  # four devices with three records each
    rolled = jax.vmap(mixing.neighbour, axis_name='batch')(values)
    np.testing.assert_array_equal(np.ravel(rolled), np.roll(np.arange(12), 1))


@pytest.mark.parametrize('stage', [1, 2])
def test_xmixup_of_feature_maps(stage):
    """The stages before on both images apart (batch statistics are of both together), the later
    ones on the mixture."""
    config = digits.get_config()
    config.xmixup.mix_at, config.xmixup.alpha, config.model.name = stage, 1.0, 'resnet6'
    made = create_model(config.model, 7, 12, 0, BatchNorm, 'float32', False)
    keys = jax.random.split(jax.random.key(3), B)
    pair = {'image': normal(B, 12, 12, 3), 'source_image': normal(B, 12, 12, 3, seed=1)}
    labels = {'label': jnp.asarray(LABELS), 'source_label': jnp.zeros(B, jnp.int32)}
    batch = METHODS['xmixup'].transform(config, keys, pair | labels)
    np.testing.assert_array_equal(batch['lam'], mixing.sample_lam(keys, 1.0, reflect=True))
    hook = METHODS['xmixup'].hook(make_view('xmixup', batch=batch)._replace(config=config))
    found = forward(*made, batch['image'], train=False, hook=hook)[0]

    mine, other = (forward(*made, image, train=False)[0].stages for image in pair.values())
    lam = np.asarray(batch['lam'])[:, None, None, None]
    mixed_maps = lam * mine[stage - 1] + (1 - lam) * other[stage - 1]

    def replace(x, at):  # the map is replaced as a whole, whatever came in
        return mixed_maps if at == stage - 1 else x

    expected = forward(*made, pair['image'], train=False, hook=replace)[0]
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(found.logits) == B


def test_xmixup_beyond_the_last_stage_is_refused():
    batch = {'label': jnp.asarray(LABELS)}
    view = make_view('xmixup', outputs=outputs(normal(2 * B, K), stages=(0, 0)), batch=batch)
    view.config.xmixup.mix_at = 3
    with pytest.raises(ConfigError, match=r'mix_at=3 is beyond the last stage .* it has 2'):
        METHODS['xmixup'].loss(view)
