import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from xmixup_jax.mixing import mix_images, mixed_cross_entropy, sample_lam

rng = np.random.default_rng(0)
B, K_T, K_S = 6, 4, 3
LOGITS = rng.normal(size=(B, K_T + K_S)).astype(np.float32)
LABELS = rng.integers(0, K_T, B)
SOURCE_LABELS = rng.integers(0, K_S, B)
LAM = rng.random(B).astype(np.float32)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 2.0])
def test_lam_follows_beta(alpha):
    keys = jax.random.split(jax.random.key(0), 4000)
    lam = np.asarray(sample_lam(keys, alpha, reflect=False), np.float64)
    lam = np.clip(lam, 1e-7, 1 - 1e-7)
    assert scipy.stats.kstest(lam, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    reflected = np.asarray(sample_lam(keys, alpha, reflect=True))
    assert reflected.min() >= 0.5
    np.testing.assert_allclose(reflected, np.maximum(lam, 1 - lam), atol=1e-6)


def test_lam_of_a_sample_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(1), 8)
    np.testing.assert_array_equal(sample_lam(keys, 0.5, True)[3:], sample_lam(keys[3:], 0.5, True))


def test_mixed_images_against_numpy():
    images, source_images = rng.normal(size=(2, B, 5, 5, 3)).astype(np.float32)
    expected = np.stack(
        [l * t + (1 - l) * s for l, t, s in zip(LAM, images, source_images, strict=True)]  # noqa: E741
    )
    np.testing.assert_allclose(mix_images(images, source_images, LAM), expected, atol=1e-6)


def expected_loss(label_space):
    log_p = scipy.special.log_softmax(LOGITS.astype(np.float64), axis=1)
    log_p_t = scipy.special.log_softmax(LOGITS[:, :K_T].astype(np.float64), axis=1)
    log_p_s = scipy.special.log_softmax(LOGITS[:, K_T:].astype(np.float64), axis=1)
    rows = np.arange(B)
    if label_space == 'target':
        return -log_p_t[rows, LABELS]
    if label_space == 'separate':
        return -LAM * log_p_t[rows, LABELS] - (1 - LAM) * log_p_s[rows, SOURCE_LABELS]
    soft = np.zeros((B, K_T + K_S))
    soft[rows, LABELS] = LAM
    soft[rows, K_T + SOURCE_LABELS] = 1 - LAM
    return -(soft * log_p).sum(1)


@pytest.mark.parametrize('label_space', ['joint', 'separate', 'target'])
def test_loss_and_gradient_against_scipy(label_space):
    def total(logits):
        return mixed_cross_entropy(logits, LABELS, SOURCE_LABELS, LAM, label_space, K_T).sum()

    loss = mixed_cross_entropy(LOGITS, LABELS, SOURCE_LABELS, LAM, label_space, K_T)
    np.testing.assert_allclose(loss, expected_loss(label_space), atol=1e-5)

    p, p_t = scipy.special.softmax(LOGITS, axis=1), scipy.special.softmax(LOGITS[:, :K_T], axis=1)
    p_s = scipy.special.softmax(LOGITS[:, K_T:], axis=1)
    y_t, y_s = np.eye(K_T)[LABELS], np.eye(K_S)[SOURCE_LABELS]
    lam = LAM[:, None]
    expected = {
        'joint': p - np.concatenate([lam * y_t, (1 - lam) * y_s], axis=1),
        'separate': np.concatenate([lam * (p_t - y_t), (1 - lam) * (p_s - y_s)], axis=1),
        'target': np.concatenate([p_t - y_t, np.zeros((B, K_S))], axis=1),
    }
    np.testing.assert_allclose(
        jax.grad(total)(jnp.asarray(LOGITS)), expected[label_space], atol=1e-5
    )


def test_unmixed_joint_loss_is_cross_entropy_over_all_classes():
    loss = mixed_cross_entropy(LOGITS, LABELS, SOURCE_LABELS, np.ones(B, np.float32), 'joint', K_T)
    log_p = scipy.special.log_softmax(LOGITS, axis=1)
    np.testing.assert_allclose(loss, -log_p[np.arange(B), LABELS], atol=1e-5)
