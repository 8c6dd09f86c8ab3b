"""config.augment: operations and random draws compared with torchvision's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from ml_collections import ConfigDict
from test_step import random_batch
from torch_networks import torchvision

from xmixup_jax.checks import validate
from xmixup_jax.compute import augment, policies
from xmixup_jax.compute import step as step_lib
from xmixup_jax.devices import shard
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced

SIDE = 24
autoaugment = torchvision.transforms.autoaugment
functional = torchvision.transforms.functional
NAMES = dict(
    zip(policies.OPERATIONS, autoaugment.RandAugment()._augmentation_space(31, (9, 9)), strict=True)
)
POLICIES = {
    'randaugment': lambda side: autoaugment.RandAugment()._augmentation_space(31, (side, side)),
    'trivialaugment': lambda side: autoaugment.TrivialAugmentWide()._augmentation_space(31),
}


def options(**values):
    defaults = {'policy': '', 'num_ops': 2, 'magnitude': 9, 'color_jitter': 0.0, 'erasing': 0.0}
    return ConfigDict(defaults | values)


def images():
    """uint8 [4, S, S, 3]: noise, smooth colours, few values in a narrow range, one colour."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    smooth = np.stack([255 * x, 200 * y, 128 * (x + y)], -1).astype(np.uint8)
    narrow = rng.integers(90, 140, size=(SIDE, SIDE, 3), dtype=np.uint8)
    return np.stack([noise, smooth, narrow, np.full_like(noise, 77)])


IMAGES = images()
apply = jax.jit(jax.vmap(policies.apply))


def ours(operation, magnitude):
    images = jnp.asarray(IMAGES, jnp.float32)
    # One operation for each image, as on accelerators.
    operations = np.full(len(images), policies.OPERATIONS.index(operation))
    return np.asarray(apply(images, operations, np.full(len(images), magnitude, np.float32)))


def torchvisions(operation, magnitude, images=IMAGES):
    images = torch.tensor(images).permute(0, 3, 1, 2)
    nearest = torchvision.transforms.InterpolationMode.NEAREST
    done = [  # one by one, since its contrast uses the mean of a whole batch
        autoaugment._apply_op(image, NAMES[operation], magnitude, nearest, None) for image in images
    ]
    return torch.stack(done).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('side', [24, 112])
@pytest.mark.parametrize('policy', POLICIES)
def test_magnitudes(policy, side):
    space = POLICIES[policy](side)
    table = policies.magnitudes(policy, side)
    for name, row in zip(policies.OPERATIONS, table, strict=True):
        expected, signed = space[NAMES[name]]
        assert signed == (name in policies._SIGNED)
        whole = name.startswith('translate')
        expected = np.trunc(expected.numpy() + 1e-5) if whole else expected.numpy()
        np.testing.assert_allclose(row, np.broadcast_to(expected, 31), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('operation', policies.OPERATIONS)
def test_operations(operation, policy):
    """Every magnitude, in both directions; exact except where the comments say so."""
    row = policies.magnitudes(policy, SIDE)[policies.OPERATIONS.index(operation)]
    signed = operation in policies._SIGNED
    for magnitude in sorted({*row, *(-row if signed else row)}):
        result, expected = ours(operation, magnitude), torchvisions(operation, float(magnitude))
        assert result.shape == IMAGES.shape
        difference = np.abs(result - expected)
        if operation in ('shear_x', 'shear_y', 'rotate'):
            # Where a position is halfway between two pixels, rounding decides.
            assert (difference > 0).mean() < 0.02, magnitude
        elif operation in ('color', 'sharpness'):
            # Where a sum is a whole number, torchvision may round it down to the next lower one.
            assert difference.max() <= 1, magnitude
        else:
            assert difference.max() == 0, magnitude


def test_operations_change_the_image():
    for operation in policies.OPERATIONS[1:]:
        magnitude = {'posterize': 3, 'translate_x': 4, 'translate_y': 4, 'rotate': 30}
        changed = (ours(operation, magnitude.get(operation, 0.5)) != IMAGES)[:3].mean()
        assert changed > 0.3, operation


def watched(policy, draws):
    """The operations and magnitudes that torchvision draws and applies."""
    seen = []
    torch.manual_seed(0)
    original = autoaugment._apply_op
    autoaugment._apply_op = lambda image, name, magnitude, **_: (
        seen.append((name, magnitude)) or image
    )
    try:
        for _ in range(draws):
            policy(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    finally:
        autoaugment._apply_op = original
    return seen


@pytest.mark.parametrize(
    ('values', 'theirs'),
    [
        ({'policy': 'randaugment'}, autoaugment.RandAugment()),
        (
            {'policy': 'randaugment', 'num_ops': 3, 'magnitude': 20},
            autoaugment.RandAugment(num_ops=3, magnitude=20),
        ),
        ({'policy': 'trivialaugment'}, autoaugment.TrivialAugmentWide()),
    ],
)
def test_draws_are_those_of_torchvision(values, theirs):
    n = 3000
    seen = watched(theirs, n)
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(jax.vmap(partial(policies.draw, options=options(**values), side=SIDE)))
    operations, magnitudes = (np.asarray(each) for each in draw(keys))
    assert operations.size == len(seen)
    names = list(NAMES.values())
    counts = np.array([[np.sum(operations == i) for i in range(14)], np.zeros(14, int)])
    for name, _ in seen:
        counts[1, names.index(name)] += 1
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3
    for i, name in enumerate(names):
        expected = np.array([magnitude for other, magnitude in seen if other == name])
        expected = np.trunc(expected) if 'Translate' in name else expected
        of_ours = magnitudes[operations == i].astype(float)
        assert scipy.stats.ks_2samp(np.round(of_ours, 4), np.round(expected, 4)).pvalue > 1e-3


def test_operations_follow_one_another():
    """Each image gets the operations that `draw` draws from its own key, in that order."""
    chosen = options(policy='randaugment', num_ops=3)
    keys = jax.random.split(jax.random.key(5), 4)
    result = jax.jit(partial(policies.augment, chosen))(keys, IMAGES)
    for i, key in enumerate(keys):
        image = IMAGES[i : i + 1]
        drawn = policies.draw(jax.random.split(key)[0], chosen, SIDE)
        for operation, magnitude in zip(*map(np.asarray, drawn), strict=True):
            image = torchvisions(policies.OPERATIONS[operation], float(magnitude), image)
        assert (np.abs(image[0] - np.asarray(result[i])) > 1).mean() < 0.02


def test_colour_jitter_as_torchvision_does():
    keys = jax.random.split(jax.random.key(1), 12)
    draw, change = (
        jax.jit(jax.vmap(lambda key: policies.draw_jitter(key, 0.8))),
        jax.jit(policies.jitter),
    )
    orders, factors = draw(keys)
    applied = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    for order, of_image in zip(np.asarray(orders), np.asarray(factors), strict=True):
        for image in IMAGES:
            expected = torch.tensor(image).permute(2, 0, 1)
            for i in order:
                expected = applied[i](expected, float(of_image[i]))
            difference = np.abs(
                change(image.astype(np.float32), order, of_image)
                - expected.permute(1, 2, 0).numpy()
            )
            # A difference of one grey level may grow in the next operation.
            assert difference.max() <= 3 and (difference > 1).mean() < 0.01


def test_colour_jitters_draws_are_those_of_torchvision():
    n = 3000
    keys = jax.random.split(jax.random.key(2), n)
    orders, factors = jax.jit(jax.vmap(lambda key: policies.draw_jitter(key, 0.4)))(keys)
    torch.manual_seed(0)
    jitter = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(n)
    ]
    for i in range(3):
        expected = [each[1 + i] for each in theirs]
        assert scipy.stats.ks_2samp(np.asarray(factors[:, i]), expected).pvalue > 1e-3
    number = np.asarray(orders) @ [9, 3, 1]
    expected = [[int(i) for i in each[0] if i < 3] for each in theirs] @ np.array([9, 3, 1])
    assert len(set(number.tolist())) == 6
    counts = [
        [np.sum(each == value) for value in set(number.tolist())] for each in (number, expected)
    ]
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3


@pytest.mark.parametrize('side', [24, 96])
def test_erased_boxes_are_those_of_torchvision(side):
    n = 4000
    keys = jax.random.split(jax.random.key(3), n)
    corner, sizes = map(
        np.asarray, jax.jit(jax.vmap(lambda key: policies.draw_box(key, side)))(keys)
    )
    assert (sizes > 0).all() and (sizes < side).all()
    assert (corner >= 0).all() and (corner + sizes <= side).all()
    torch.manual_seed(0)
    erasing, image = torchvision.transforms.RandomErasing(), torch.zeros(3, side, side)
    get = partial(erasing.get_params, image, erasing.scale, erasing.ratio, [0.0])
    theirs = np.array([get()[:4] for _ in range(n)], float)
    for of_ours, expected in (
        (sizes[:, 0] * sizes[:, 1], theirs[:, 2] * theirs[:, 3]),
        (sizes[:, 0] / sizes[:, 1], theirs[:, 2] / theirs[:, 3]),
        (corner[:, 0], theirs[:, 0]),
        (corner[:, 1], theirs[:, 1]),
    ):
        assert scipy.stats.ks_2samp(of_ours, expected).pvalue > 1e-3


def test_the_share_of_images_that_lose_a_box():
    keys = jax.random.split(jax.random.key(4), 2000)
    images = np.ones((2000, 12, 12, 3), np.float32)
    erased = np.asarray(policies.erase(keys, images, 0.3))
    lost = (erased == 0).all(-1)
    assert ((erased == 0).any(-1) == lost).all()  # in all channels
    assert scipy.stats.binomtest(int(lost.any((1, 2)).sum()), 2000, 0.3).pvalue > 1e-3
    for mask in lost[lost.any((1, 2))]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns)


@pytest.fixture
def view(config):
    """(training view of images by config.augment, keys, images uint8)."""
    config.update({'resize': 30, 'image_size': SIDE, 'flip': True})
    batch = np.random.default_rng(1).integers(256, size=(16, 30, 30, 3), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(7), 16)

    def view(images=batch, keys=keys, clean=False, **values):
        changed = config.copy_and_resolve_references()
        changed.augment.update(values)
        return np.asarray(augment.training_view(changed, keys, images, clean))

    return view, keys, batch


ALL = {'policy': 'trivialaugment', 'color_jitter': 0.4, 'erasing': 0.7}


def test_crops_and_mirrors_are_the_same_with_augmentation(view, config):
    view, keys, batch = view
    plain = augment.random_crop_flip(keys, batch, SIDE, flip=True)
    plain = np.asarray(augment.normalize(plain, config.model))
    np.testing.assert_array_equal(view(), plain)
    np.testing.assert_array_equal(view(**ALL, clean=True), plain)
    erased = view(erasing=1.0)
    assert ((erased == plain) | (erased == 0)).all() and (erased != plain).any((1, 2, 3)).all()


@pytest.mark.parametrize('values', [ALL, {'policy': 'randaugment'}, {'color_jitter': 1.0}])
def test_an_image_is_augmented_by_its_own_key_alone(view, values):
    view, keys, batch = view
    whole = view(**values)
    np.testing.assert_allclose(view(batch[3:5], keys[3:5], **values), whole[3:5], atol=0.03)
    same = view(np.repeat(batch[:1], 16, 0), **values)
    assert len({image.tobytes() for image in same}) > 12


def test_resized_crops_are_augmented(view, config):
    view, _, _ = view
    config.crop_min_area = 0.2
    seen = view(policy='randaugment')
    raw = np.asarray(augment.denormalize(jnp.asarray(seen), config.model), float)
    np.testing.assert_allclose(augment.normalize(raw, config.model), seen, atol=1e-4)


@pytest.mark.parametrize('method', ['xmixup', 'bituning'])
def test_every_image_of_a_batch_is_augmented_by_a_key_of_its_own(config, method):
    """The target, source and second views are augmented; clean statistics are not affected."""
    config.method = method
    config.augment.update(ALL)
    batch = random_batch(8)
    method_ = step_lib.method_of(config)
    _, plain = augment.prepare_batch(config, method_, batch, 0, clean=True)
    _, seen = augment.prepare_batch(config, method_, batch, 0)
    others = {'xmixup': 'source_image', 'bituning': 'second_image'}[method]
    for name in ('image', others):
        assert (np.asarray(seen[name]) != plain[name]).any((1, 2, 3)).mean() > 0.7
    moved = [np.asarray(seen[name] == 0).all(-1) for name in ('image', others)]
    assert (moved[0] != moved[1]).any()


def test_the_inputs_of_the_report_are_augmented(config):
    config.method = 'xmixup'
    config.augment.update({'policy': 'randaugment', 'erasing': 1.0, 'color_jitter': 0.2})
    task, _ = step_lib.create_task(config, Sizes(10, 10))
    batch = random_batch(8)
    seen = task.input_step(with_traced({}, config), shard(batch))
    _, plain = augment.prepare_batch(config, step_lib.method_of(config), batch, 0, clean=True)
    raw = augment.denormalize(plain['image'], config.model)
    assert (np.asarray(seen['image']) != raw).any((1, 2, 3)).all()


def test_statistics_estimated_anew_are_those_of_clean_images(config):
    found = []
    for values in ({}, ALL):
        config.augment.update(values)
        task, state = step_lib.create_task(config, Sizes(10))
        found.append(jax.device_get(task.moments_step(state, shard(random_batch(16)))))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('policy', 'autoaugment', 'must be one of , randaugment, trivialaugment'),
        ('num_ops', 0, 'positive'),
        ('magnitude', 31, 'from 0 to 30'),
        ('color_jitter', 1.5, 'from 0 to 1'),
        ('erasing', -0.1, 'from 0 to 1'),
    ],
)
def test_impossible_values(config, key, value, words):
    config.augment[key] = value
    with pytest.raises(ConfigError, match=rf'config\.augment\.{key}=.*{words}'):
        validate(config, 1)
