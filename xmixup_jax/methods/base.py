"""What a transfer-learning method has to say; the loop and the step know nothing else of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.matching import ClassMatch
from xmixup_jax.models import Outputs
from xmixup_jax.models.base import Hook
from xmixup_jax.optimizer import HEAD, make_optimizer

PyTree = Any
Batch = dict[str, Any]


class Sizes(NamedTuple):
    """Numbers of classes."""

    target: int
    """K_t; the first K_t logits are always the target's."""
    source: int = 0
    """K_s, the source classes that were selected by the class match; 0 without pairs."""
    pretrained: int = 0
    """K_0, the classes of the pre-trained network's own head; 0 if it has none."""


class View(NamedTuple):
    """What a method sees of one step, on one device, under the mapped axis 'batch'."""

    config: ConfigDict
    num_classes: int
    """K_t."""
    key: jax.Array
    """A random key of this step, the same on all devices."""
    params: PyTree
    """The network's, those that are differentiated."""
    batch: Batch
    """What `transform` made of the batch."""
    constants: PyTree
    """What `prepare` left for all steps, for example the reference network's parameters."""
    memory: PyTree
    """What `prepare` began and `after_step` changes from step to step."""
    network: Callable[..., Outputs]
    """(params, batch_stats, images, train=False) to Outputs; leaves batch statistics alone."""
    batch_stats: PyTree
    """The network's, before this step."""
    taught: PyTree = None
    """What `teach` returned; no gradient flows into it."""
    outputs: Outputs | None = None
    """The network's outputs for batch['image'], in training mode."""

    @property
    def logits(self) -> jax.Array:
        """The target's logits, float32 [B, K_t]."""
        return self.outputs.logits[: len(self.batch['label']), : self.num_classes]

    @property
    def extra_logits(self) -> jax.Array:
        """The other heads' logits, float32 [B, extra]."""
        return self.outputs.logits[:, self.num_classes :]


class Setup(NamedTuple):
    """What a preparatory phase works with, on the host, before the first step."""

    config: ConfigDict
    sizes: Sizes
    state: Any
    """The initial TrainState of NumPy arrays, with pre-trained backbone, and the head random, or
    that of `with_linear_head`."""
    head: dict[str, np.ndarray] | None
    """Kernel [D, K_0] and bias [K_0] of the pre-trained network's own head."""
    target: Any
    """Records to train on."""
    source: Any
    """The source's Records, if the method pairs or `reads_source`."""
    match: ClassMatch | None
    """Of the target's classes, if the method pairs."""
    network: Callable[..., Outputs]
    """(params, batch_stats, images, train=False, hook=None) to Outputs."""
    source_columns: Callable[[], np.ndarray]
    """The columns of `head` that stand for the selected source classes, int32 [K_s]."""
    images: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    """Records to (centre crops float32 [N, H, W, 3], labels int32 [N])."""
    outputs: Callable[[Any, Any], dict[str, np.ndarray]]
    """(TrainState, Records) to 'features' [N, D], 'logits' [N, K] and 'label' [N]."""
    class_means: Callable[[Any], np.ndarray]
    """Records to the mean features of each class in the pre-trained backbone, [K, D]."""
    source_test: Callable[[], Any]
    """Opens the Records of config.source.test_split."""
    train: Callable[[ConfigDict, Any, str], tuple[PyTree, PyTree]]
    """(config, records, name) to (params, batch_stats) after a fine-tuning run on the records
    that starts from the pre-trained backbone; kept in the folder `name` of the work directory."""


class Prepared(NamedTuple):
    """The outcome of a preparatory phase."""

    state: Any
    constants: PyTree
    """Nested dicts of arrays."""


def no_extra_logits(config: ConfigDict, sizes: Sizes) -> int:
    del config, sizes
    return 0


def same(config: ConfigDict, keys: jax.Array, batch: Batch) -> Batch:
    """The transform of methods that train on the images as they are."""
    del config, keys
    return batch


def unprepared(setup: Setup) -> Prepared:
    """The preparation of methods that need none."""
    return Prepared(setup.state, {})


def cross_entropy(view: View) -> jax.Array:
    """Mean cross-entropy of the target's label among the target's logits."""
    return optax.softmax_cross_entropy_with_integer_labels(view.logits, view.batch['label']).mean()


class Method(NamedTuple):
    """A method: its coefficients and pure functions. Everything has the default of fine-tuning."""

    loss: Callable[[View], jax.Array] = cross_entropy
    """Scalar, the mean over this device's share of the batch."""

    penalty: Callable[[View], jax.Array] | None = None
    """A second scalar, added to the loss, or kept apart for `combine`."""

    combine: Callable[[PyTree, PyTree], PyTree] | None = None
    """(gradient of the loss, gradient of the penalty) to the gradient that is followed; both are
    those of the whole batch. None: their sum, in one backward pass."""

    defaults: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    """The coefficients, as published; `config.METHOD` in a configuration."""

    transform: Callable[[ConfigDict, jax.Array, Batch], Batch] = same
    """(config, keys [B], batch) to the batch whose 'image' goes through the network. The batch
    holds 'image' float32 [B, H, W, 3], 'label' int32 [B] and 'progress' float32 [B], the share of
    the steps that are done; with `pairs` also 'source_image' and
    'source_label' (an index among the selected source classes), with `second_view` also
    'second_image', the same images cropped and mirrored anew."""

    pairs: bool = False
    """Whether each target record comes with an auxiliary source record."""

    changes_images: bool = False
    """Whether training sees images that are not clean crops of the target (mixed ones, or the
    source's). The statistics of batch norm are then estimated anew before a test; see
    `reestimation`."""

    second_view: bool = False

    hook: Callable[[View], Hook | None] | None = None
    """(view) to what changes the feature maps within the network, the `hook` of `models.forward`;
    None where they stay."""

    teach: Callable[[View], PyTree] | None = None
    """What the loss aims at, computed beforehand and without gradient."""

    after_step: Callable[[View, Any], Any] | None = None
    """(view, TrainState after the update) to the TrainState that is kept; of view.batch there is
    the 'label' alone."""

    extra_logits: Callable[[ConfigDict, Sizes], int] = no_extra_logits
    """Width of further heads; they are the head's columns from K_t on."""

    reads_source: Callable[[ConfigDict], bool] = lambda config: False
    """Whether `prepare` needs the source's records."""

    prepare: Callable[[Setup], Prepared] = unprepared
    """The preparatory phase."""

    optimizer: Callable[[ConfigDict], optax.GradientTransformation] = lambda config: make_optimizer(
        config.optimizer, config.steps
    )

    norm: Callable[[ConfigDict], Callable] | None = None
    """(config) to a constructor that replaces batch normalisation, with the arguments of
    `models.BatchNorm`."""


def without_weight_decay(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of methods whose penalty replaces weight decay."""
    return make_optimizer(config.optimizer, config.steps, weight_decay=False)


def reference(setup: Setup) -> Prepared:
    """Keeps the initial network, w0, as constants 'params' and 'batch_stats'."""
    state = setup.state
    return Prepared(state, {'params': state.params, 'batch_stats': state.batch_stats})


def reference_outputs(view: View) -> Outputs:
    """What the network kept by `reference` makes of the batch, in evaluation mode."""
    constants = view.constants
    return view.network(constants['params'], constants['batch_stats'], view.batch['image'])


def pretrained_columns(config: ConfigDict, sizes: Sizes) -> int:
    """Extra logits for the pre-trained network's own head.

    Raises:
      ConfigError: it has none.
    """
    if not sizes.pretrained:
        raise ConfigError(
            f'config.method={config.method} continues the head of the pre-trained network, but '
            f'config.weights={config.weights!r} holds none (fc.weight): give weights with their '
            'head, or config.weights=source'
        )
    return sizes.pretrained


def linear_classifier(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression, scikit-learn's with its default penalty.

    Args:
      features: float [N, D].
      labels: int [N], each of the K classes at least once.

    Returns:
      (kernel float32 [D, K], bias float32 [K]).
    """
    fitted = LogisticRegression(max_iter=1000).fit(features, labels)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if kernel.shape[1] == 1:  # of two classes scikit-learn gives the second one's logit alone
        kernel, bias = np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    return kernel.astype(np.float32), bias.astype(np.float32)


def target_classifier(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """`linear_classifier` of the target's pre-trained features, of training images' centre crops.

    Raises:
      DataError: a class has no readable image.
    """
    outputs = setup.outputs(setup.state, setup.target)
    missing = np.setdiff1d(np.arange(setup.sizes.target), outputs['label'])
    if len(missing):
        raise DataError(
            'config.warm_head=True and config.method=delta need a readable training image of each '
            f'class: {setup.target.class_names[missing[0]]} has none'
        )
    return linear_classifier(outputs['features'], outputs['label'])


def with_linear_head(setup: Setup) -> Any:
    """The initial state with `target_classifier` in the target's columns.

    Linear probing comes first, as in Kumar et al., "Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution", ICLR 2022.
    """
    places = slice(None, setup.sizes.target)
    return _with_columns(setup.state, places, *target_classifier(setup))


def with_pretrained_head(setup: Setup) -> Any:
    """The initial state with the pre-trained head in the columns from K_t on."""
    places = slice(setup.sizes.target, None)
    return _with_columns(setup.state, places, setup.head['kernel'], setup.head['bias'])


def _with_columns(state: Any, places: slice, kernel: np.ndarray, bias: np.ndarray) -> Any:
    head = {key: np.array(value) for key, value in state.params[HEAD].items()}
    head['kernel'][:, places], head['bias'][places] = kernel, bias
    return replace(state, params=state.params | {HEAD: head})
