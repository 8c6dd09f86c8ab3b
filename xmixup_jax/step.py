"""The training and evaluation steps: pure per-device functions, and the one line that maps each.

State is replicated without a leading device axis (`in_axes=None`): since JAX 0.8 `pmap` is a `jit`
of a `shard_map`, for which that is the natural form, and nothing ever has to be indexed by device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from xmixup_jax import augment
from xmixup_jax.methods import METHODS
from xmixup_jax.models import create_model, forward

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array
    """int32 scalar, updates done."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def make_schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then `step` (one drop) or `cosine` (to 0)."""
    warmup = optimizer.warmup_steps
    peak = optimizer.learning_rate
    if optimizer.schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    drop = round(optimizer.drop_at * steps)
    schedule = optax.piecewise_constant_schedule(peak, {drop - warmup: optimizer.drop_factor})
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def make_optimizer(optimizer: ConfigDict, steps: int) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay; the head (`fc`) learns faster by a factor."""

    def is_head(params):
        return jax.tree.map_with_path(lambda path, _: path[0].key == 'fc', params)

    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.sgd(make_schedule(optimizer, steps), optimizer.momentum, optimizer.nesterov),
        # SGD's update is linear in the learning rate, so scaling one is scaling the other.
        optax.masked(optax.scale(optimizer.head_multiplier), is_head),
    )


@dataclass(frozen=True)
class Task:
    """The static side of a run: what the steps close over."""

    config: ConfigDict
    graphdef: Any
    tx: optax.GradientTransformation
    num_classes: int

    @cached_property
    def eval_step(self) -> Callable[[TrainState, PyTree], PyTree]:
        """The mapped `eval_step`; kept, so that it is compiled once a run."""
        return map_eval_step(partial(eval_step, self))


def create_task(
    config: ConfigDict, num_classes: int, num_source_classes: int
) -> tuple[Task, TrainState]:
    """Builds network and optimiser for K_t target and K_s selected source classes."""
    num_logits = METHODS[config.method].num_logits(config, num_classes, num_source_classes)
    graphdef, params, batch_stats = create_model(config.model, num_logits, config.seed)
    tx = make_optimizer(config.optimizer, config.steps)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params))
    return Task(config, graphdef, tx, num_classes), state


def train_step(task: Task, state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
    """One update from this device's part of the batch, under a mapped axis 'batch'.

    Args:
      task: static.
      state: replicated; the same on every device before and after.
      batch: one device's share of `pairing.train_batches`.

    Returns:
      the new state, and {'loss', 'top1'}: scalars, means over the whole batch. 'top1' counts
      the target's label among the target's logits, on the images as the network saw them.
    """
    config, method = task.config, METHODS[task.config.method]
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(batch['seed'])
    key_image, key_source, key_method = keys[:, 0], keys[:, 1], keys[:, 2]

    def prepare(keys, images):
        images = augment.random_crop_flip(keys, images, config.image_size, config.flip)
        return augment.normalize(images)

    images = {'image': prepare(key_image, batch['image']), 'label': batch['label']}
    if method.uses_source:
        images['source_image'] = prepare(key_source, batch['source_image'])
        images['source_label'] = batch['source_label']
    inputs = method.transform(config, key_method, images)

    def loss_fn(params):
        outputs, batch_stats = forward(
            task.graphdef, params, state.batch_stats, inputs['image'], train=True
        )
        return method.loss(config, task.num_classes, outputs, inputs), (outputs, batch_stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (outputs, batch_stats)), grads = grad_fn(state.params)
    prediction = jnp.argmax(outputs.logits[:, : task.num_classes], axis=-1)
    top1 = jnp.mean(prediction == batch['label'])
    grads, metrics = jax.lax.pmean((grads, {'loss': loss, 'top1': top1}), 'batch')
    # Batch norm has reduced its statistics over 'batch' already; this only says so to the mapping.
    batch_stats = jax.lax.pmean(batch_stats, 'batch')
    updates, opt_state = task.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def eval_step(task: Task, state: TrainState, batch: PyTree) -> PyTree:
    """Sums over the real records of a batch of `pairing.eval_batches`, over all devices.

    Returns:
      {'loss', 'correct', 'count'}: float32 scalars, sums with masked records left out; the loss
      is the cross-entropy of the target's logits alone.
    """
    images = augment.normalize(augment.center_crop(batch['image'], task.config.image_size))
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    logits = outputs.logits[:, : task.num_classes].astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    correct = jnp.argmax(logits, axis=-1) == batch['label']
    mask = batch['mask']
    sums = {'loss': (loss * mask).sum(), 'correct': (correct * mask).sum(), 'count': mask.sum()}
    return jax.lax.psum(sums, 'batch')


def feature_step(task: Task, num_classes: int, state: TrainState, batch: PyTree) -> PyTree:
    """Sums of the penultimate features of each class over a batch of `pairing.eval_batches`.

    Returns:
      (sums float32 [num_classes, D], counts float32 [num_classes]), over all devices.
    """
    images = augment.normalize(augment.center_crop(batch['image'], task.config.image_size))
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    one_hot = jax.nn.one_hot(batch['label'], num_classes) * batch['mask'][:, None]
    sums = jnp.einsum('bk,bd->kd', one_hot, outputs.features, precision='highest')
    return jax.lax.psum((sums, one_hot.sum(0)), 'batch')


def map_train_step(step_fn):
    """Maps (state, batch) -> (state, metrics) over the devices; donates the old state."""
    return jax.pmap(step_fn, axis_name='batch', in_axes=(None, 0), out_axes=None, donate_argnums=0)


def map_eval_step(step_fn):
    """Maps (state, batch) -> sums over the devices."""
    return jax.pmap(step_fn, axis_name='batch', in_axes=(None, 0), out_axes=None)


def _mesh() -> Mesh:
    return Mesh(jax.local_devices(), ('batch',))


def replicate(tree: PyTree) -> PyTree:
    """Puts a copy of `tree` on every local device.

    The copies are new buffers, so that donating them leaves the caller's arrays alone.
    """
    tree = jax.tree.map(np.array, tree)
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def shard(batch: PyTree) -> PyTree:
    """Host arrays [b, ...] to device arrays [local devices, b / local devices, ...]."""
    devices = jax.local_device_count()
    batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    return jax.device_put(batch, NamedSharding(_mesh(), PartitionSpec('batch')))


def wait_if_simulated(tree: PyTree) -> None:
    """Waits for `tree` where several devices are simulated on one CPU.

    Two collective programs in flight there can starve each other of threads and hang (seen with
    JAX 0.10.2 and 8 devices on 2 cores). On real devices this does nothing.
    """
    if jax.default_backend() == 'cpu' and jax.local_device_count() > 1:
        jax.block_until_ready(tree)
