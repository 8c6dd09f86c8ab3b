"""Parts that several methods share: the reference network, heads, an optimiser."""

from dataclasses import replace
from typing import Any

import numpy as np
import optax
from ml_collections import ConfigDict

from xmixup_jax.errors import DataError
from xmixup_jax.methods.base import Prepared, Setup, Sizes, View
from xmixup_jax.models import Outputs
from xmixup_jax.optimizer import HEAD, make_optimizer


def without_weight_decay(options: ConfigDict, config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of methods whose penalty replaces weight decay."""
    del options
    return make_optimizer(config.optimizer, config.steps, weight_decay=False)


def reference(setup: Setup) -> Prepared:
    """Keeps the initial network, w0, as the constants 'params' and 'batch_stats'."""
    state = setup.state
    return Prepared(state, {'params': state.params, 'batch_stats': state.batch_stats})


def reference_outputs(view: View) -> Outputs:
    """The outputs of the network kept by `reference` for the batch, in evaluation mode."""
    constants = view.constants
    return view.network(constants['params'], constants['batch_stats'], view.batch['image'])


def always(options: ConfigDict) -> bool:
    """True, for `Method.needs_head` and `Method.reads_source`."""
    del options
    return True


def pretrained_columns(options: ConfigDict, sizes: Sizes) -> int:
    """The width of the pre-trained network's own head, for methods with `needs_head`."""
    del options
    return sizes.pretrained


def linear_classifier(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression, scikit-learn's with its default penalty.

    Args:
      features: float [N, D].
      labels: int [N], each of the K classes at least once.

    Returns:
      (kernel float32 [D, K], bias float32 [K]).
    """
    # Takes over a second to import, and few runs need it.
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(features, labels)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if kernel.shape[1] == 1:  # of two classes scikit-learn gives the second one's logit alone
        kernel, bias = np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    return kernel.astype(np.float32), bias.astype(np.float32)


def target_classifier(setup: Setup, needed_by: str) -> tuple[np.ndarray, np.ndarray]:
    """`linear_classifier` of the pre-trained features of the training images' centre crops.

    Args:
      setup: of the run.
      needed_by: the flag that asks for it, for the error.

    Raises:
      DataError: a class has no readable image.
    """
    features, labels = setup.features(setup.target)
    missing = np.setdiff1d(np.arange(setup.sizes.target), labels)
    if len(missing):
        raise DataError(
            f'{needed_by} needs a readable training image of each class: '
            f'{setup.target.class_names[missing[0]]} has none'
        )
    return linear_classifier(features, labels)


def with_linear_head(setup: Setup) -> Any:
    """The initial state with `target_classifier` in the target's columns.

    Linear probing comes first, as in Kumar et al., "Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution", ICLR 2022.
    """
    places = slice(None, setup.sizes.target)
    needed_by = 'config.warm_head=True' if setup.config.warm_head else 'config.freeze=backbone'
    classifier = target_classifier(setup, needed_by)
    return _with_columns(setup.state, places, *classifier)


def with_pretrained_head(setup: Setup) -> Any:
    """The initial state with the pre-trained head in the columns from K_t on."""
    places = slice(setup.sizes.target, None)
    assert setup.head is not None  # as `Method.needs_head` demands
    return _with_columns(setup.state, places, setup.head['kernel'], setup.head['bias'])


def _with_columns(state: Any, places: slice, kernel: np.ndarray, bias: np.ndarray) -> Any:
    head = {key: np.array(value) for key, value in state.params[HEAD].items()}
    head['kernel'][:, places], head['bias'][places] = kernel, bias
    return replace(state, params=state.params | {HEAD: head})
