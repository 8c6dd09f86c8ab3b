"""The interface of a method. The loop and the step use nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from xmixup_jax import mixing
from xmixup_jax.matching import ClassMatch
from xmixup_jax.methods.options import Option
from xmixup_jax.models import Outputs
from xmixup_jax.models.base import Hook
from xmixup_jax.optimizer import make_optimizer

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
    """Everything a method sees of one step, on one device, under the mapped axis 'batch'."""

    name: str
    """Of the method, for messages that name its options as config.NAME.KEY."""
    options: ConfigDict
    """The method's own options."""
    config: ConfigDict
    """The whole configuration."""
    num_classes: int
    """K_t."""
    key: jax.Array
    """A random key of this step, the same on all devices."""
    params: PyTree
    """The network's parameters, which are differentiated."""
    batch: Batch
    """The batch after `transform`."""
    constants: PyTree
    """The constants from `prepare`, for example the reference network's parameters."""
    memory: PyTree
    """The method's own state, which `prepare` begins and `after_step` changes."""
    network: Callable[..., Outputs]
    """Maps (params, batch_stats, images, train=False) to Outputs; batch statistics stay."""
    batch_stats: PyTree
    """The network's batch statistics before this step."""
    class_weights: jax.Array | None = None
    """Weights of the target's classes in the loss, float32 [K_t]; None where all are 1. See
    config.balance."""
    taught: PyTree = None
    """The value of `teach`; no gradient flows into it."""
    outputs: Outputs = None  # type: ignore[assignment]  # set before `loss` and `penalty`
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
    """Everything a preparatory phase can use, on the host, before the first step."""

    name: str
    """Of the method, for messages that name its options as config.NAME.KEY."""
    options: ConfigDict
    """The method's own options."""
    config: ConfigDict
    """The whole configuration."""
    sizes: Sizes
    state: Any
    """The initial TrainState, in NumPy arrays. The backbone is pre-trained; the head is random or
    that of `with_linear_head`."""
    head: dict[str, np.ndarray] | None
    """Kernel [D, K_0] and bias [K_0] of the pre-trained network's own head."""
    target: Any
    """Records to train on."""
    source: Any
    """The source's Records, if the method pairs or `reads_source`."""
    match: ClassMatch | None
    """The match of the target's classes, if the method pairs."""
    network: Callable[..., Outputs]
    """Maps (params, batch_stats, images, train=False, hook=None) to Outputs."""
    source_columns: Callable[[], np.ndarray]
    """Returns the columns of `head` for the selected source classes, int32 [K_s]."""
    images: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    """Maps Records to (centre crops float32 [N, H, W, 3], labels int32 [N])."""
    outputs: Callable[[Any, Any], dict[str, np.ndarray]]
    """Maps (TrainState, Records) to 'features' [N, D], 'logits' [N, K] and 'label' [N]."""
    classifier: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Returns `parts.linear_classifier` of the target's features in the pre-trained backbone."""
    class_means: Callable[[Any], np.ndarray]
    """Maps Records to the mean features of each class in the pre-trained backbone, [K, D]."""
    source_test: Callable[[], Any]
    """Opens the Records of config.source.test_split."""
    train: Callable[[ConfigDict, Any, str], tuple[PyTree, PyTree]]
    """Maps (config, records, name) to (params, batch_stats) after fine-tuning the pre-trained
    backbone on the records. The run is kept in the folder `name` of the work directory."""


class Prepared(NamedTuple):
    """The outcome of a preparatory phase."""

    state: Any
    constants: PyTree
    """Nested dicts of arrays."""


def no_extra_logits(options: ConfigDict, sizes: Sizes) -> int:
    """Returns 0, as the head has only the target's columns."""
    del options, sizes
    return 0


def never(options: ConfigDict) -> bool:
    """False, for methods that need nothing but the target and the backbone."""
    del options
    return False


def same(options: ConfigDict, keys: jax.Array, batch: Batch) -> Batch:
    """The transform of methods that train on the images as they are."""
    del options, keys
    return batch


def unprepared(setup: Setup) -> Prepared:
    """The preparation of methods that need none."""
    return Prepared(setup.state, {})


def plain_optimizer(options: ConfigDict, config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser that `config.optimizer` describes."""
    del options
    return make_optimizer(config.optimizer, config.steps)


def cross_entropy(view: View) -> jax.Array:
    """Mean cross-entropy of the target's label among the target's logits.

    With config.label_smoothing and config.balance.weights; see `mixing.class_cross_entropy`.
    """
    smoothing, weights = view.config.label_smoothing, view.class_weights
    return mixing.class_cross_entropy(view.logits, view.batch['label'], smoothing, weights).mean()


class Method(NamedTuple):
    """A method: its options and pure functions. Every default is that of plain fine-tuning."""

    loss: Callable[[View], jax.Array] = cross_entropy
    """The mean loss over this device's share of the batch, a scalar."""

    penalty: Callable[[View], jax.Array] | None = None
    """A second scalar, which is added to the loss, or kept apart for `combine`."""

    combine: Callable[[PyTree, PyTree], PyTree] | None = None
    """Maps (gradient of the loss, gradient of the penalty) to the gradient that is followed. Both
    are gradients of the whole batch. None: their sum, in one backward pass."""

    options: dict[str, Option] = {}  # noqa: RUF012  (never written to)
    """Options by key, with published values as defaults where there are any; see `methods.options`.
    The functions below get the values as `options`, `view.options` or `setup.options`."""

    transform: Callable[[ConfigDict, jax.Array, Batch], Batch] = same
    """Maps (options, keys [B], batch) to the batch whose 'image' goes through the network. The
    batch holds 'image' float32 [B, H, W, 3], 'label' int32 [B] and 'progress' float32 [B], the
    share of the steps that are done. With `pairs` it also holds 'source_image' and 'source_label'
    (an index among the selected source classes), with `second_view` also 'second_image', a second
    crop of each image."""

    pairs: bool = False
    """Whether each target record comes with an auxiliary source record."""

    changes_images: bool = False
    """Whether training sees images that are not clean crops of the target (mixed ones, or the
    source's). The batch-norm statistics are then estimated again before each test; see
    `reestimation`."""

    needs_backbone: bool = False
    """Whether the method has no effect on a frozen backbone; config.freeze=backbone is then
    refused."""

    second_view: bool = False
    """Whether the batch has a second crop of each image."""

    hook: Callable[[View], Hook | None] | None = None
    """Maps a view to a function that changes the feature maps within the network, the `hook` of
    `models.forward`. None leaves them as they are."""

    teach: Callable[[View], PyTree] | None = None
    """Computes targets of the loss before it, without gradient; see `View.taught`."""

    after_step: Callable[[View, Any], Any] | None = None
    """Maps (view, TrainState after the update) to the TrainState that is kept. Here view.batch
    holds only 'label'."""

    extra_logits: Callable[[ConfigDict, Sizes], int] = no_extra_logits
    """Maps (options, sizes) to the width of further heads, the head's columns from K_t on."""

    needs_head: Callable[[ConfigDict], bool] = never
    """Whether the method, with these options, continues the head of the pre-trained network.
    Weights without a head are then refused."""

    reads_source: Callable[[ConfigDict], bool] = never
    """Whether `prepare`, with these options, needs the source's records."""

    prepare: Callable[[Setup], Prepared] = unprepared
    """The preparatory phase."""

    optimizer: Callable[[ConfigDict, ConfigDict], optax.GradientTransformation] = plain_optimizer
    """Maps (options, config) to the optimiser."""

    norm: Callable[[ConfigDict], Callable] | None = None
    """Maps options to a constructor that replaces batch normalisation, with the arguments of
    `models.BatchNorm`."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options' default values."""
        return {key: option.default for key, option in self.options.items()}
