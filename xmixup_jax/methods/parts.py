"""Parts that several methods share: the reference network, heads, an optimiser."""

from collections.abc import Sequence
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


def linear_classifier(
    features: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression, scikit-learn's with its default penalty.

    Args:
      features: float [N, D].
      labels: int [N].
      class_names: K names.

    Returns:
      (kernel float32 [D, K], bias float32 [K]).

    Raises:
      DataError: a class has no image.
    """
    missing = np.setdiff1d(np.arange(len(class_names)), labels)
    if len(missing):
        raise DataError(
            f'class {class_names[missing[0]]!r} of the target has no readable training image, but '
            'DELTA, config.warm_head=True and config.freeze=backbone start with a linear '
            'classifier of all classes: add an image, or remove the class'
        )
    # Takes over a second to import, and few runs need it.
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(features, labels)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if kernel.shape[1] == 1:  # of two classes scikit-learn gives the second one's logit alone
        kernel, bias = np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    return kernel.astype(np.float32), bias.astype(np.float32)


def with_linear_head(setup: Setup) -> Any:
    """The initial state with `Setup.classifier` in the target's columns.

    Linear probing comes first, as in Kumar et al., "Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution", ICLR 2022.
    """
    return _with_columns(setup.state, slice(None, setup.sizes.target), *setup.classifier())


def with_pretrained_head(setup: Setup) -> Any:
    """The initial state with the pre-trained head in the columns from K_t on."""
    places = slice(setup.sizes.target, None)
    assert setup.head is not None  # as `Method.needs_head` demands
    return _with_columns(setup.state, places, setup.head['kernel'], setup.head['bias'])


def _with_columns(state: Any, places: slice, kernel: np.ndarray, bias: np.ndarray) -> Any:
    head = {key: np.array(value) for key, value in state.params[HEAD].items()}
    head['kernel'][:, places], head['bias'][places] = kernel, bias
    return replace(state, params=state.params | {HEAD: head})
