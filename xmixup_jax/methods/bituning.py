"""Contrasts features and logits with a queue of labelled keys.

Zhong, Wang, Kou, Wang, Long, "Bi-tuning of Pre-trained Representations", 2020,
https://arxiv.org/abs/2011.06182. A key encoder follows the network by momentum and sees a second
crop of each image. With the query's projection z and its features h (a one appended, for the bias),
both of length 1,

    loss = CE(logits, y) + weight * (contrast(z_q . z_k) + contrast(w_y . h)),

where contrast is the cross-entropy between two distributions over the current score and all keys
in the queue: the softmax of the scores, at a temperature, and the uniform distribution over the
current one and the keys of class y. In the first contrast the current score is that of the image's
own key. In the second it is that of the query; query and keys are scored by the classifier's column
w_y (of length 1, no gradient).

Order and coefficients are those of TLlib (`bi_tuning.py`), the library of the authors' laboratory:
the first contrast sees the queue before this batch's keys enter it, the second one after. TLlib's
loss lacks the entropy of the uniform distribution, a constant.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.base import Method, Prepared, Setup, View, cross_entropy
from xmixup_jax.methods.options import count, fraction, non_negative, positive
from xmixup_jax.optimizer import HEAD


def normalize(x):
    """Scales rows to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def with_one(x):
    """Appends a one: [..., D] to [..., D + 1]."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def encode(view: View, outputs):
    """Returns (h [B, D + 1], z [B, d]), rows of length 1."""
    projection = outputs.logits[:, view.num_classes :]
    return normalize(with_one(outputs.features)), normalize(projection)


def contrast(current, queue, labels, temperature):
    """Mean contrastive loss.

    Args:
      current: [B], the current score.
      queue: [B, K, L], the scores of L keys of each of K classes.
      labels: int [B].

    >>> queue = jnp.zeros((1, 2, 3))  # no score stands out: uniform over 1 + 6 scores
    >>> round(float(contrast(jnp.zeros(1), queue, jnp.array([1]), 0.07) / jnp.log(7)), 4)
    1.0
    """
    scores = jnp.concatenate([current[:, None], queue.reshape(len(queue), -1)], axis=1)
    own_class = jax.nn.one_hot(labels, queue.shape[1])[..., None]
    positives = jnp.broadcast_to(own_class, queue.shape).reshape(len(queue), -1)
    positives = jnp.concatenate([jnp.ones_like(current)[:, None], positives], axis=1)
    return optax.softmax_cross_entropy(
        scores / temperature, positives / positives.sum(1, keepdims=True)
    ).mean()


def teach(view: View):
    keys = view.network(
        view.memory['params'], view.batch_stats, view.batch['second_image'], train=True
    )
    h, z = encode(view, keys)
    return {'h': h, 'z': z}


def loss(view: View):
    options, labels = view.options, view.batch['label']
    h, z = encode(view, view.outputs)
    projected = contrast(
        jnp.sum(z * view.taught['z'], axis=1),
        jnp.einsum('bd,kld->bkl', z, view.memory['z']),
        labels,
        options.temperature,
    )
    fc = jax.lax.stop_gradient(view.params[HEAD])
    columns = jnp.concatenate([fc['kernel'], fc['bias'][None]]).T[: view.num_classes]
    own = normalize(columns)[labels]
    classified = contrast(
        jnp.sum(own * h, axis=1),
        jnp.einsum('bd,kld->bkl', own, enqueued(view)['h']),
        labels,
        options.temperature,
    )
    return cross_entropy(view) + options.weight * (projected + classified)


def enqueue(memory, h, z, labels):
    """Replaces the oldest keys of each class by new ones; the queue has a ring for each class.

    Args:
      memory: 'h' [K, L, D + 1], 'z' [K, L, d], 'next' int32 [K].
      h, z: keys, [B, ...].
      labels: int32 [B].
    """
    num_classes, length = memory['h'].shape[:2]
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
    rank = (jnp.cumsum(one_hot, axis=0) * one_hot).sum(axis=1) - 1
    counts = one_hot.sum(axis=0)
    # More keys of a class than it has places: the last ones stay; beyond the end is dropped.
    stays = rank >= counts[labels] - length
    place = jnp.where(stays, (memory['next'][labels] + rank) % length, length)
    return memory | {
        'h': memory['h'].at[labels, place].set(h, mode='drop'),
        'z': memory['z'].at[labels, place].set(z, mode='drop'),
        'next': (memory['next'] + counts) % length,
    }


def enqueued(view: View):
    """The memory after the keys of the whole batch, over all devices, have entered."""
    keys = view.taught | {'label': view.batch['label']}
    keys = jax.lax.all_gather(keys, 'batch', tiled=True)
    return enqueue(view.memory, keys['h'], keys['z'], keys['label'])


def after_step(view: View, state):
    memory = enqueued(view)
    step_size = 1.0 - view.options.momentum
    params = optax.incremental_update(state.params, memory['params'], step_size)
    return replace(state, memory=memory | {'params': params})


def prepare(setup: Setup) -> Prepared:
    options, state = setup.options, setup.state
    if setup.config.head_init == 'zero':
        raise ConfigError(
            f'config.head_init=zero: the projector of config.method={setup.name}, a part of the '
            'head, cannot learn from zero: use --config.head_init=normal or uniform'
        )
    rng = np.random.default_rng(setup.config.seed)
    width = len(state.params[HEAD]['kernel'])

    def queue(size):
        keys = rng.normal(size=(setup.sizes.target, options.queue, size)).astype(np.float32)
        return keys / np.linalg.norm(keys, axis=-1, keepdims=True)

    memory = {
        'params': state.params,
        'h': queue(width + 1),
        'z': queue(options.dim),
        'next': np.zeros(setup.sizes.target, np.int32),
    }
    return Prepared(replace(state, memory=memory), {})


METHOD = Method(
    loss=loss,
    options={
        'weight': non_negative(1.0, 'weight of both contrasts', traced=True),
        'queue': count(40, 'keys of each class in the queue'),
        'momentum': fraction(0.999, 'share of the key encoder that a step keeps', traced=True),
        'temperature': positive(0.07, 'divides the scores', traced=True),
        'dim': count(128, 'length of the projection'),
    },
    second_view=True,
    teach=teach,
    after_step=after_step,
    extra_logits=lambda options, sizes: options.dim,
    prepare=prepare,
)
