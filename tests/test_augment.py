import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from xmixup_jax.augment import center_crop, normalize, random_crop_flip

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
