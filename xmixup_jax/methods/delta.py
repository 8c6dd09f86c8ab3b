"""Keeps the feature maps close to the pre-trained ones, weighted by channel.

Li, Xiong, Wang, Rao, Liu, Chen, Huan, "DELTA: Deep Learning Transfer using Feature Map with
Attention for Convolutional Networks", ICLR 2019, https://arxiv.org/abs/1901.09229. With F_c the
map [h, w] of channel c, of C, that a stage's last convolution puts out (before its batch norm):

    penalty = alpha / 2 * sum over images, stages, channels of C * a_c * ||F_c - F0_c||^2 / (h w)
              + beta / 2 * ||w_head||^2

The channel weights are a = softmax(r / 5) over the channels. r is the rise of the loss when that
channel's filter is zeroed in the reference network, under a linear classifier of its features. It
is standardised over the channels (mean 0, standard deviation 1).

Maps, reductions and weights are those of the authors' code (lixingjian/DELTA). There the classifier
is trained by SGD on random crops, and the rises are averaged over four batches of 32 random crops.
Here the classifier is a logistic regression on centre crops, and the rises are measured on `images`
centre crops. There the running statistics of batch norm become the target's while the classifier is
trained; here the rises are measured with the pre-trained ones.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import softmax

from xmixup_jax.methods import l2sp
from xmixup_jax.methods.base import Method, Prepared, Setup, View
from xmixup_jax.methods.options import count, non_negative
from xmixup_jax.methods.parts import (
    reference,
    reference_outputs,
    without_weight_decay,
)


def teach(view: View):
    return reference_outputs(view).convs


def map_distance(convs, reference_convs, channel_weights):
    """Mean over the batch of the sum over stages and channels of C a_c ||F_c - F0_c||^2 / (h w).

    Args:
      convs, reference_convs: feature maps, [B, h, w, C] each.
      channel_weights: [C] each, a.

    >>> ones = jnp.ones((2, 4, 4, 3))
    >>> float(map_distance([ones], [0 * ones], [jnp.array([0.5, 0.25, 0.25])]))
    3.0
    """
    total: jax.Array | float = 0.0
    for maps, reference_maps, weights in zip(convs, reference_convs, channel_weights, strict=True):
        squares = jnp.square(maps - reference_maps).mean(axis=(0, 1, 2))
        total += len(weights) * jnp.sum(weights * squares)
    return total


def penalty(view: View):
    options = view.options
    weights = [view.constants['channels'][name] for name in sorted(view.constants['channels'])]
    distance = map_distance(view.outputs.convs, view.taught, weights)
    head = l2sp.head_norm(view.params, all_parameters=True)
    return options.alpha / 2 * view.config.batch_size * distance + options.beta / 2 * head


def channel_weights(network, params, batch_stats, images, labels, classifier):
    """The importance of the channels at the end of each stage.

    Args:
      network: as in `Setup`.
      images: float32 [N, H, W, 3].
      labels: int32 [N].
      classifier: (kernel [D, K], bias [K]) on the pooled features.

    Returns:
      a list of float32 [C], each a softmax.
    """
    kernel, bias = classifier

    # Everything large is an argument: constants would be folded, which takes long.
    @jax.jit
    def stage_ends(params, batch_stats, images):
        kept: list = []

        def keep(x, stage, place):
            if place == 'end':
                kept.append(x)
            return x

        network(params, batch_stats, images, hook=keep)
        return kept

    @jax.jit
    def ends_of_zeros(ends, params, batch_stats, images):
        """The ends of the stages, each where its own last convolution puts out zeros."""
        kept: list = []

        def keep(x, stage, place):
            if place == 'conv':
                return jnp.zeros_like(x)
            kept.append(x)
            return ends[stage]

        network(params, batch_stats, images, hook=keep)
        return kept

    @partial(jax.jit, static_argnames='zeroed_stage')
    def loss_without(c, end, end_of_zeros, params, batch_stats, images, *, zeroed_stage):
        def hook(x, stage, place):
            if (stage, place) != (zeroed_stage, 'end'):
                return x
            return jnp.where(jnp.arange(x.shape[-1]) == c, end_of_zeros, end)

        outputs = network(params, batch_stats, images, hook=hook)
        logits = outputs.features @ kernel + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # Between a stage's last convolution and its end no channel depends on another one. So a zeroed
    # filter changes one channel of the end, and what lies before need not be computed again: with
    # the end replaced, the compiler leaves it out.
    arguments = jax.device_put((params, batch_stats, images))
    ends = stage_ends(*arguments)
    weights = []
    for i, pair in enumerate(zip(ends, ends_of_zeros(ends, *arguments), strict=True)):
        # A call for each channel: in a loop within one program convolutions are slow on a CPU. One
        # beyond the last: none is zeroed.
        channels = range(pair[0].shape[-1] + 1)
        losses = [loss_without(c, *pair, *arguments, zeroed_stage=i) for c in channels]
        *zeroed, none_zeroed = jax.device_get(losses)
        weights.append(attention(np.array(zeroed) - none_zeroed))
    return weights


def attention(rises: np.ndarray) -> np.ndarray:
    """The channel weights, float32 [C], from the rises of the loss [C].

    >>> weights = attention(np.array([0.0, 1.0, 2.0]))
    >>> round(float(weights[2] / weights[0]), 2), round(float(weights.sum()), 2)
    (1.63, 1.0)
    """
    spread = rises.std()
    standardized = (rises - rises.mean()) / (spread if spread > 0 else 1.0)
    return softmax(standardized / 5).astype(np.float32)


def prepare(setup: Setup) -> Prepared:
    chosen = min(setup.options.images, len(setup.target))
    spread = np.linspace(0, len(setup.target) - 1, chosen).astype(int)
    images, labels = setup.images(setup.target.select(spread))
    state, constants = reference(setup)
    weights = channel_weights(
        setup.network, state.params, state.batch_stats, images, labels, setup.classifier()
    )
    channels = {f'stage{i}': weight for i, weight in enumerate(weights)}
    return Prepared(state, constants | {'channels': channels})


METHOD = Method(
    penalty=penalty,
    teach=teach,
    options={
        'alpha': non_negative(0.01, "weight of the feature maps' distance", traced=True),
        'beta': non_negative(0.01, 'weight decay of the head', traced=True),
        'images': count(128, 'target images from which the channel weights are computed'),
    },
    prepare=prepare,
    optimizer=without_weight_decay,
    needs_backbone=True,
)
