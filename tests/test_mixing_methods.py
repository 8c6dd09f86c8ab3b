"""Co-Train, mixup, CutMix and SMILE compared with their public code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from tests import torch_recipes
from tests.method_checks import (
    CLOSE,
    K_0,
    LABELS,
    LABELS_T,
    B,
    K,
    check,
    make_view,
    nchw,
    normal,
    on_batch_axis,
    outputs,
)
from xmixup_jax import mixing
from xmixup_jax.compute.state import TrainState
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS, cutmix, smile
from xmixup_jax.models import BatchNorm, create_model, forward


def test_cotrain():
    source_label = np.array([2, 0, 1, 1, 0, 2])

    def ours(logits):
        batch = {'label': jnp.asarray(LABELS), 'source_label': jnp.asarray(source_label)}
        view = make_view('cotrain', outputs=outputs(logits), batch=batch)
        return METHODS['cotrain'].loss(view)

    def theirs(logits):
        labels = torch.tensor(source_label).long()
        return torch_recipes.cotrain_loss(logits[:B, :K], LABELS_T, logits[B:, K:], labels)

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


def transformed(name, seed=3, **changes):
    options = digits.get_config()[name]
    options.update(changes)
    keys = jax.random.split(jax.random.key(seed), B)
    transform = on_batch_axis(lambda batch: METHODS[name].transform(options, keys, batch))
    batch = batch_of_images()
    return batch, jax.tree.map(np.asarray, transform(batch))


BEFORE = torch.tensor(np.roll(np.arange(B), 1))
"""Each record meets the one before."""


@pytest.mark.parametrize('name', ['mixup', 'smile'])
def test_mixup_of_a_batch(name):
    before, after = transformed(name, alpha=1.0)
    (lam,) = np.unique(after['lam'])
    images = torch.tensor(before['image'])
    expected = torch_recipes.mixup_batch(images, LABELS_T, float(lam), BEFORE)
    for key, value in zip(('image', 'label', 'other_label'), expected, strict=True):
        np.testing.assert_allclose(after[key], value, **CLOSE)


def test_mixup_of_each_sample_and_smiles_reflection():
    _, after = transformed('mixup', alpha=1.0, lam='sample')
    assert len(np.unique(after['lam'])) == B
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), B)
        plain, reflected = (
            on_batch_axis(lambda keys, r=r: mixing.sample_lam(keys, 1.0, r, 'batch'))(keys)
            for r in (False, True)
        )
        expected = torch_recipes.smile_lambda(float(plain[0]))
        np.testing.assert_allclose(reflected, np.full(B, expected), rtol=1e-6)


def test_cutmix_pastes_one_box_into_a_batch_with_its_probability():
    pasted_batches = 0
    for seed in range(20):
        before, after = transformed('cutmix', seed=seed)
        images = torch.tensor(before['image']).permute(0, 3, 1, 2)
        changed = (after['image'] != before['image']).any((0, 3))
        pasted_batches += changed.any()
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        box = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if changed.any() else (0,) * 4
        expected = torch_recipes.cutmix_batch(images, box, BEFORE).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(after['image'], expected)
        lam = torch_recipes.cutmix_lam(box, 10, 10)
        np.testing.assert_allclose(after['lam'], np.full(B, lam), rtol=1e-6)
    assert 4 <= pasted_batches <= 16


def test_cutmix_of_each_sample_pastes_boxes_and_weights_by_their_area():
    before, after = transformed('cutmix', alpha=1.0, prob=1.0, lam='sample')
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


@given(st.integers(0, 31), st.integers(0, 31), st.integers(0, 1000), st.sampled_from((7, 32)))
def test_cutmix_box(row, column, thousandth, size):
    centre, lam = np.array([row, column]) % size, thousandth / 1000
    mask = jax.jit(cutmix.box_mask, static_argnums=2)(lam, centre, size)
    top, left, bottom, right = torch_recipes.cutmix_box(size, size, lam, *map(int, centre))
    expected = np.zeros((size, size), bool)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(mask, expected)


def test_smile():
    maps, teacher_maps = normal(B, 2, 2, 3), normal(B, 2, 2, 3, seed=1)
    teacher_logits = normal(B, K_0)
    lam = np.float32(0.7)
    batch = {key: jnp.asarray(value) for key, value in MIXED.items()} | {'lam': jnp.full(B, lam)}
    view = make_view(
        'smile',
        batch=batch | {'unmixed': None},
        network=lambda *_: outputs(
            np.pad(teacher_logits, ((0, 0), (K, 0))), stages=(teacher_maps,)
        ),
        memory={'params': None},
        constants={'batch_stats': None},
    )
    taught = on_batch_axis(lambda _: smile.teach(view))(0)

    def ours(z, maps):
        seen = make_view('smile', batch=batch, taught=taught, outputs=outputs(z, stages=(maps,)))
        seen.options.feature_weight = 0.3
        return smile.loss(seen)

    def theirs(z, maps):
        teacher = nchw(torch.tensor(teacher_maps)), torch.tensor(teacher_logits)
        student = z[:, :K], z[:, K:], nchw(maps)
        labels = LABELS_T, BEFORE, float(lam)
        return torch_recipes.smile_loss(*student, *teacher, *labels, feature_weight=0.3)

    check(ours, theirs, normal(B, K + K_0), maps)


def test_smile_teacher_follows_the_backbone_and_keeps_its_head():
    teacher = {'conv1.weight': normal(2), 'fc.weight': normal(2, seed=1)}
    before, after = ({name: normal(2, seed=s) for name in teacher} for s in (2, 3))

    def tree(leaves):
        return {'conv1': leaves['conv1.weight'], 'fc': leaves['fc.weight']}

    ours = {'params': tree(teacher)}
    theirs = {name: torch.tensor(value) for name, value in teacher.items()}
    for iteration in range(21):
        # The parameters before a step, and after it.
        student = {name: value + iteration for name, value in before.items()}
        view = make_view('smile', params=tree(student))
        state = TrainState(jnp.asarray(iteration + 1), tree(after), {}, {}, ours)
        ours = smile.after_step(view, state).memory
        student = {name: torch.tensor(value) for name, value in student.items()}
        theirs = torch_recipes.smile_teacher(theirs, student, iteration)
        found = {'conv1.weight': ours['params']['conv1'], 'fc.weight': ours['params']['fc']}
        for name, value in theirs.items():
            np.testing.assert_allclose(found[name], value, **CLOSE)
    assert not np.allclose(found['conv1.weight'], teacher['conv1.weight'], atol=1e-3)


def test_neighbour_goes_around_the_whole_batch():
    values = np.arange(12).reshape(4, 3)  # four devices with three records each
    rolled = jax.vmap(mixing.neighbour, axis_name='batch')(values)
    np.testing.assert_array_equal(np.ravel(rolled), np.roll(np.arange(12), 1))


@pytest.mark.parametrize('stage', [1, 2])
def test_xmixup_of_feature_maps(stage):
    """Earlier stages process both images separately (with joint batch statistics), later stages
    process the mixture."""
    config = digits.get_config()
    config.model.name = 'resnet6'
    options = config.xmixup
    options.update(mix_at=stage, alpha=1.0)
    made = create_model(config.model, 7, 12, 0, BatchNorm, 'float32', False)
    keys = jax.random.split(jax.random.key(3), B)
    pair = {'image': normal(B, 12, 12, 3), 'source_image': normal(B, 12, 12, 3, seed=1)}
    labels = {'label': jnp.asarray(LABELS), 'source_label': jnp.zeros(B, jnp.int32)}
    batch = METHODS['xmixup'].transform(options, keys, pair | labels)
    np.testing.assert_array_equal(batch['lam'], mixing.sample_lam(keys, 1.0, reflect=True))
    hook = METHODS['xmixup'].hook(make_view('xmixup', batch=batch, options=options))
    found = forward(*made, batch['image'], train=False, hook=hook)[0]

    mine, other = (forward(*made, image, train=False)[0].stages for image in pair.values())
    lam = np.asarray(batch['lam'])[:, None, None, None]
    mixed_maps = lam * mine[stage - 1] + (1 - lam) * other[stage - 1]

    def replace(x, at, place):  # the map is replaced entirely
        return mixed_maps if (at, place) == (stage - 1, 'end') else x

    expected = forward(*made, pair['image'], train=False, hook=replace)[0]
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(found.logits) == B


def test_xmixup_beyond_the_last_stage_is_refused():
    batch = {'label': jnp.asarray(LABELS)}
    view = make_view('xmixup', outputs=outputs(normal(2 * B, K), stages=(0, 0)), batch=batch)
    view.options.mix_at = 3
    with pytest.raises(
        ConfigError, match=r'config\.xmixup\.mix_at=3 is beyond the last stage .* it has 2'
    ):
        METHODS['xmixup'].loss(view)
