import jax
import numpy as np
import pytest
import scipy.stats
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch_networks import torchvision

from xmixup_jax.compute.augment import (
    center_crop,
    normalize,
    random_crop_flip,
    random_part,
    resized_part,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 10, 10, 3), np.uint8)
KEYS = jax.random.split(jax.random.key(0), 64)


def windows(image, size):
    span = range(image.shape[0] - size + 1)
    return {(i, j): image[i : i + size, j : j + size] for i in span for j in span}


def test_crops_are_windows_at_every_offset_and_half_are_mirrored():
    crops = np.asarray(random_crop_flip(KEYS, IMAGES, 8, flip=True))
    offsets, mirrored = set(), 0
    for image, crop in zip(IMAGES, crops, strict=True):
        found = [
            (offset, flip)
            for offset, window in windows(image, 8).items()
            for flip in (False, True)
            if np.array_equal(window[:, ::-1] if flip else window, crop)
        ]
        assert len(found) == 1
        offsets.add(found[0][0])
        mirrored += found[0][1]
    assert len(offsets) == 9
    assert 16 <= mirrored <= 48


def test_no_flip_and_full_size_keep_the_image():
    np.testing.assert_array_equal(random_crop_flip(KEYS, IMAGES, 10, flip=False), IMAGES)


def test_a_crop_depends_on_its_own_key_alone():
    crops = random_crop_flip(KEYS, IMAGES, 7, flip=True)
    np.testing.assert_array_equal(
        random_crop_flip(KEYS[5:9], IMAGES[5:9], 7, flip=True), crops[5:9]
    )


def test_center_crop():
    np.testing.assert_array_equal(center_crop(IMAGES, 6), IMAGES[:, 2:8, 2:8])


@pytest.mark.parametrize(
    ('name', 'chosen', 'mean', 'std'),
    [
        ('resnet50', '', [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ('efficientnet_lite0', '', 0.5, 0.5),
        ('vit_b16', 'imagenet', [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_normalize_as_torchvision_and_timm_do(name, chosen, mean, std):
    model = ConfigDict({'name': name, 'normalization': chosen})
    expected = (IMAGES / 255.0 - mean) / std
    np.testing.assert_allclose(normalize(IMAGES, model), expected, atol=1e-5)


def test_random_parts_are_those_of_torchvision():
    """Area, aspect and position have the same distributions, within the error of 4,000 draws."""
    side, n = 96, 4000
    keys = jax.random.split(jax.random.key(1), n)
    corner, sizes = jax.jit(jax.vmap(lambda key: random_part(key, side, 0.08)))(keys)
    assert (corner >= 0).all() and (corner + sizes <= side).all()
    torch.manual_seed(0)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    image = torch.zeros(3, side, side)
    theirs = np.array([get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)], float)
    for ours, expected in (
        (sizes[:, 0] * sizes[:, 1], theirs[:, 2] * theirs[:, 3]),
        (sizes[:, 1] / sizes[:, 0], theirs[:, 3] / theirs[:, 2]),
        (corner[:, 0], theirs[:, 0]),
    ):
        assert scipy.stats.ks_2samp(np.asarray(ours), expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ('corner', 'sizes', 'size'), [((0, 0), (10, 10), 6), ((2, 1), (5, 8), 6), ((4, 3), (3, 4), 8)]
)
def test_parts_are_scaled_as_in_pillow(corner, sizes, size):
    ours = resized_part(IMAGES[0], np.float32(corner), np.float32(sizes), size)
    (top, left), (height, width) = corner, sizes
    for channel in range(3):
        image = Image.fromarray(IMAGES[0, ..., channel].astype(np.float32))
        box = (left, top, left + width, top + height)
        expected = image.resize((size, size), Image.Resampling.BILINEAR, box)
        np.testing.assert_allclose(ours[..., channel], expected, atol=1e-3)


def test_resized_crops_of_one_image_differ():
    crops = np.asarray(random_crop_flip(KEYS, IMAGES[:1].repeat(64, 0), 6, True, 0.2))
    assert crops.shape == (64, 6, 6, 3) and crops.dtype == np.float32
    assert len({crop.tobytes() for crop in crops}) > 40
