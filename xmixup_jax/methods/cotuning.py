"""Trains the pre-trained head with the target's labels, translated to source classes.

You, Kou, Long, Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020,
https://proceedings.neurips.cc/paper/2020/file/c8067ad1937f728f51288b3eb986afaa-Paper.pdf:

    loss = CE(z_t, y) + weight * CE(softmax(z_s), p(y_s | y_t = y)).

The category relationship p(y_s | y_t) is the paper's direct one: the mean over a target class of
the pre-trained network's probabilities, calibrated by a temperature that is fitted to the
source's held-out split (config.source.test_split).

TLlib has the direct relationship too, without calibration (`temperature` = 1). The authors' script
(thuml/CoTuning) divides ImageNet's logits by 1.131, inverts p(y_t | y_s) of a logistic regression,
and trains the new head, but not the pre-trained one, at ten times the rate. Here
config.optimizer.head_multiplier multiplies the rate of both.
"""

import numpy as np
import optax
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from xmixup_jax.methods.base import Method, Prepared, Setup, View, cross_entropy
from xmixup_jax.methods.options import non_negative
from xmixup_jax.methods.parts import always, pretrained_columns, with_pretrained_head


def loss(view: View):
    translated = view.constants['relationship'][view.batch['label']]
    source_loss = optax.softmax_cross_entropy(view.extra_logits, translated).mean()
    return cross_entropy(view) + view.options.weight * source_loss


def fit_temperature(logits, labels):
    """The temperature that minimises the cross-entropy (Guo et al., ICML 2017).

    Args:
      logits: [N, K].
      labels: int [N].

    >>> logits = np.array([[2.0, 0.0]] * 4)  # too sure: half of it is right
    >>> fit_temperature(logits, np.array([0, 0, 1, 1])) > 10
    True
    """

    def nll(log_temperature):
        log_p = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -log_p[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(nll, bounds=(-3.0, 3.0), method='bounded').x))


def relationship(logits, labels, num_classes, temperature):
    """p(y_s | y_t), float32 [K_t, K_0]: mean calibrated probabilities of each target class.

    Args:
      logits: the pre-trained head's for the target's images, [N, K_0].
      labels: int [N].
      num_classes: K_t.
      temperature: divides the logits, see `fit_temperature`.

    >>> relationship(np.zeros((3, 4)), np.array([0, 1, 1]), 2, 1.0)[1].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    probabilities = softmax(logits / temperature, axis=1)
    means = [probabilities[labels == c].mean(axis=0) for c in range(num_classes)]
    return np.stack(means).astype(np.float32)


def prepare(setup: Setup) -> Prepared:
    state = with_pretrained_head(setup)
    num_classes = setup.sizes.target
    temperature = setup.options.temperature
    if not temperature:
        held_out = setup.outputs(state, setup.source_test())
        temperature = fit_temperature(held_out['logits'][:, num_classes:], held_out['label'])
    outputs = setup.outputs(state, setup.target)
    table = relationship(
        outputs['logits'][:, num_classes:], outputs['label'], num_classes, temperature
    )
    return Prepared(state, {'relationship': table})


METHOD = Method(
    loss=loss,
    options={
        'weight': non_negative(2.3, "weight of the pre-trained head's cross-entropy", traced=True),
        'temperature': non_negative(
            0.0, "calibrates the pre-trained head; 0: fitted to the source's test split"
        ),
    },
    extra_logits=pretrained_columns,
    needs_head=always,
    reads_source=lambda options: not options.temperature,
    prepare=prepare,
    needs_backbone=True,
)
