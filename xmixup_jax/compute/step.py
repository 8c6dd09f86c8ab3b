"""The training and evaluation steps: pure per-device functions, which `mapping` maps."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from xmixup_jax.compute import augment, freezing
from xmixup_jax.compute.mapping import map_eval_step, map_input_step, map_train_steps
from xmixup_jax.compute.network import create_network, create_network_head
from xmixup_jax.compute.state import TrainState, update_average, with_average
from xmixup_jax.compute.views import over_views
from xmixup_jax.config import experiment_values, unflatten
from xmixup_jax.data.balance import CLASS_WEIGHTS
from xmixup_jax.data.pool import look_up
from xmixup_jax.devices import on_host
from xmixup_jax.methods.base import Method, Sizes, View
from xmixup_jax.methods.find import (
    config_with,
    method_name,
    method_of,
    options_of,
    traced_keys,
    traced_shapes,
    with_traced,
)
from xmixup_jax.models import Outputs, forward
from xmixup_jax.models.normalization import batch_part, over_devices
from xmixup_jax.optimizer import HEAD, set_peak
from xmixup_jax.weights.pretrained import Weights

PyTree = Any


@dataclass(frozen=True, eq=False)
class Task:
    """Everything fixed during a run. Hashed by identity, so that each Task compiles once."""

    config: ConfigDict
    """Without the values of `find.traced_keys`, which are among the constants."""
    graphdef: Any
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    """Maps the constants of `find.with_traced` to the optimiser."""
    num_classes: int
    shapes: TrainState
    """A state with shapes and dtypes in place of arrays, and without the method's memory."""
    frozen: PyTree
    """A tree like params, with True for frozen ones; None without config.freeze."""

    @cached_property
    def train_steps(self) -> Callable[..., tuple[TrainState, PyTree]]:
        """The mapped `train_steps`. Cached, like the ones below, so that it compiles once."""
        return map_train_steps(partial(train_steps, self))

    @cached_property
    def eval_step(self) -> Callable[[TrainState, PyTree], PyTree]:
        """The mapped `eval_step`."""
        return map_eval_step(partial(eval_step, self))

    @cached_property
    def output_step(self) -> Callable[[TrainState, PyTree], PyTree]:
        """The mapped `output_step`."""
        return map_eval_step(partial(output_step, self))

    @cached_property
    def moments_step(self) -> Callable[[TrainState, PyTree], PyTree]:
        """The mapped `moments_step`."""
        return map_eval_step(partial(moments_step, self))

    @cached_property
    def input_step(self) -> Callable[[PyTree, PyTree], PyTree]:
        """The mapped `input_step`."""
        return map_input_step(partial(input_step, self))


def create_task(
    config: ConfigDict, sizes: Sizes, backbone: Weights | None = None
) -> tuple[Task, TrainState]:
    """Builds the network, the optimiser and the first state of a run.

    Args:
      config: of the experiment.
      sizes: numbers of classes, which the width of the head depends on.
      backbone: the weights of all but the head; None: random ones.

    Returns:
      (task, state); the state's arrays are on the host.

    Raises:
      DataError: the weights do not fit the network.
    """
    task = make_task(config, sizes)
    with on_host():
        if backbone is None:
            params, batch_stats = create_network(config, sizes)[1:]
        else:
            params = task.shapes.params | {HEAD: create_network_head(config, sizes)}
            params, batch_stats = backbone.fill(params, task.shapes.batch_stats)
        tx = task.optimizer(with_traced({}, config))
        state = _state(config, tx, params, batch_stats)
    return task, with_peak(state, config)


def with_peak(state: TrainState, config: ConfigDict) -> TrainState:
    """Sets the configuration's learning rate in the state; it is not a part of the `Task`."""
    peak = np.float32(config.optimizer.learning_rate)
    return replace(state, opt_state=set_peak(state.opt_state, peak))


def make_task(config: ConfigDict, sizes: Sizes) -> Task:
    """Builds only the `Task`.

    Runs in one process that differ only in seed, learning rate or the values of `find.traced_keys`
    share their Task, and with it the compiled steps.
    """
    same = {'seed': 0, 'optimizer.learning_rate': 1.0}
    values = experiment_values(config) | same | {'remat': config.remat, 'method': config.method}
    for key in traced_keys(config):
        del values[key]
    return _shared_task(json.dumps(values, sort_keys=True), sizes)


@lru_cache(maxsize=32)
def _shared_task(flat_values: str, sizes: Sizes) -> Task:
    config = ConfigDict(unflatten(json.loads(flat_values)))
    frozen = None
    graphdef, params, batch_stats = nnx.eval_shape(partial(create_network, config, sizes))
    if config.freeze:
        network = graphdef, params, batch_stats
        frozen = freezing.frozen_params(config.freeze, config.image_size, *network)
        graphdef = freezing.freeze_batch_norms(*network, frozen)
    optimizer = partial(_optimizer, config, frozen)

    def state(constants, params, batch_stats):
        return _state(config, optimizer(constants), params, batch_stats)

    shapes = jax.eval_shape(state, traced_shapes(config), params, batch_stats)
    return Task(config, graphdef, optimizer, sizes.target, shapes, frozen)


def _optimizer(
    config: ConfigDict, frozen: PyTree, constants: PyTree
) -> optax.GradientTransformation:
    config = config_with(config, constants)
    tx = method_of(config).optimizer(options_of(config), config)
    return tx if frozen is None else freezing.skip_frozen(tx, frozen)


def _state(
    config: ConfigDict, tx: optax.GradientTransformation, params: PyTree, batch_stats: PyTree
) -> TrainState:
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params), {})
    return with_average(state) if config.ema_decay else state


def train_steps(
    task: Task, constants: PyTree, state: TrainState, pool: PyTree, batches: PyTree
) -> tuple[TrainState, PyTree]:
    """Makes several updates in one program, where launching one takes longer than a step.

    Args:
      task, constants, state: as in `train_step`.
      pool: this device's share of the images cached on the devices, uint8 [n, R, R, 3], by the
        batch entry that they replace; see `look_up`.
      batches: this device's share of one batch for each step, [steps, b, ...].

    Returns:
      (state, metrics): the new state, and the metrics of each step, [steps].
    """

    def one(state, batch):
        return train_step(task, constants, state, look_up(pool, batch))

    steps = len(batches['label'])
    if steps > 1:
        return _scan(one, state, batches)
    state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], metrics)


def _scan(body, carry, xs):
    # On CPUs, XLA runs convolutions inside a loop about ten times slower.
    return jax.lax.scan(body, carry, xs, unroll=jax.default_backend() == 'cpu')


def train_step(
    task: Task, constants: PyTree, state: TrainState, batch: PyTree
) -> tuple[TrainState, PyTree]:
    """Makes one update from this device's share of the batch, under a mapped axis 'batch'.

    With config.accumulate_steps=N the share is processed in N parts, one after the other. Each part
    is a batch of its own to batch norm and to the method.

    Args:
      task: static.
      constants: of the method, from its preparation, see `find.with_traced`; replicated.
      state: replicated; the same on every device before and after.
      batch: one device's share of `pairing.train_batches`.

    Returns:
      (state, metrics): the new state, and {'loss', 'top1'}, scalar means over the whole batch.
      'top1' is the accuracy among the target classes, on the images as the network saw them. If the
      batch has 'stop', the metrics have its maximum over the whole batch.
    """
    method, parts = method_of(task.config), task.config.accumulate_steps
    if parts == 1:
        grads, batch_stats, metrics, seen = _gradients(task, constants, state, batch)
    else:

        def add(carry, part):
            sums, batch_stats = carry
            now = replace(state, batch_stats=batch_stats)
            grads, batch_stats, metrics, seen = _gradients(task, constants, now, part)
            sums = jax.tree.map(jnp.add, sums, (grads, metrics))
            return (sums, batch_stats), seen

        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(partial(_gradients, task), constants, state, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
        (sums, batch_stats), seen = _scan(add, (zeros, state.batch_stats), split)
        grads, metrics = jax.tree.map(lambda x: x / parts, sums)
        seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
    # Batch norm has already averaged its statistics over 'batch'. With config.batch_norm_over this
    # averages the moving averages of the devices.
    grads, metrics, batch_stats = jax.lax.pmean((grads, metrics, batch_stats), 'batch')
    grads = method.combine(*grads) if method.combine else grads
    updates, opt_state = task.optimizer(constants).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    changed = {'params': params, 'batch_stats': batch_stats, 'opt_state': opt_state}
    new = replace(state, step=state.step + 1, **changed)
    if method.after_step:
        view = _view(task, constants, state, seen['batch'], _step_key(batch))
        new = method.after_step(view._replace(taught=seen['taught']), new)
    if task.config.ema_decay:
        new = update_average(new, task.config.ema_decay)
    if 'stop' in batch:
        metrics['stop'] = jax.lax.pmax(jnp.max(batch['stop']), 'batch')
    return new, metrics


def _gradients(task: Task, constants: PyTree, state: TrainState, batch: PyTree) -> PyTree:
    """Computes the gradients of one device and one part of its batch, not averaged over devices.

    Returns:
      (grads, batch_stats, metrics, seen). `grads` is one gradient, or a list of the gradients of
      loss and penalty if the method combines them. `seen` is for `Method.after_step`: 'batch' with
      the labels, and 'taught'.
    """
    config, method = config_with(task.config, constants), method_of(task.config)
    prepared = augment.prepare_batch(config, method, batch, state.step)
    inputs = method.transform(options_of(config), *prepared)
    view = _view(task, constants, state, inputs, _step_key(batch))
    if method.teach:
        view = view._replace(taught=jax.lax.stop_gradient(method.teach(view)))

    def terms(params):
        if task.frozen is not None:
            params = freezing.stop_gradients(params, task.frozen)
        outputs, batch_stats = forward(
            task.graphdef,
            params,
            state.batch_stats,
            inputs['image'],
            train=True,
            key=view.key,
            hook=method.hook and method.hook(view),
        )
        if config.batch_norm == 'mixed':
            batch_stats = state.batch_stats  # every step mixes in the pre-trained statistics
        seen = view._replace(params=params, outputs=outputs)
        penalty = method.penalty(seen) if method.penalty else 0.0
        return method.loss(seen), penalty, (seen.logits, batch_stats)

    def total(params):
        loss, penalty, others = terms(params)
        return loss + penalty, others

    if method.combine:
        # XLA merges the forward passes, so this costs one forward and two backward passes.
        loss, others = total(state.params)
        grads = [jax.grad(lambda params, i=i: terms(params)[i])(state.params) for i in (0, 1)]
    else:
        (loss, others), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    logits, batch_stats = others
    top1 = jnp.mean(jnp.argmax(logits, axis=-1) == inputs['label'])
    seen = {'batch': {'label': inputs['label']}, 'taught': view.taught}
    return grads, batch_stats, {'loss': loss, 'top1': top1}, seen


def _step_key(batch: PyTree) -> jax.Array:
    """A key from the seeds of all records, independent of the number of devices."""
    return jax.random.key(jax.lax.psum(jnp.sum(batch['seed']), 'batch'))


def _view(task: Task, constants: PyTree, state: TrainState, batch: PyTree, key) -> View:
    config = config_with(task.config, constants)
    return View(
        name=method_name(task.config.method),
        options=options_of(config),
        config=config,
        num_classes=task.num_classes,
        key=key,
        params=state.params,
        batch=batch,
        constants=constants,
        class_weights=constants.get(CLASS_WEIGHTS),
        memory=state.memory,
        network=partial(network, task.graphdef),
        batch_stats=state.batch_stats,
    )


def network(graphdef, params, batch_stats, images, train: bool = False, hook=None) -> Outputs:
    """`models.forward` for a second network, such as a teacher; returns its outputs only."""
    return forward(graphdef, params, batch_stats, images, train=train, hook=hook)[0]


def eval_step(task: Task, state: TrainState, batch: PyTree) -> PyTree:
    """Computes the target logits of a batch of `pairing.eval_batches`.

    Returns:
      {'logits' float32 [B, K_t] of `over_views`, 'label' [B], 'index' [B], 'mask' [B]}, gathered
      from all devices.
    """
    outputs = partial(network, task.graphdef, state.params, state.batch_stats)
    logits = over_views(
        task.config, lambda images: outputs(images).logits[:, : task.num_classes], batch['image']
    )
    values = {key: batch[key] for key in ('label', 'index', 'mask')} | {'logits': logits}
    return jax.lax.all_gather(values, 'batch', tiled=True)


def output_step(task: Task, state: TrainState, batch: PyTree) -> PyTree:
    """Computes the network's outputs for a batch of `pairing.eval_batches`.

    Returns:
      {'features' [B, D], 'logits' [B, K], 'label' [B], 'mask' [B]}, gathered from all devices.
    """
    images = augment.evaluation_view(task.config, batch['image'])
    outputs = network(task.graphdef, state.params, state.batch_stats, images)
    values = {'features': outputs.features, 'logits': outputs.logits}
    values |= {'label': batch['label'], 'mask': batch['mask']}
    return jax.lax.all_gather(values, 'batch', tiled=True)


def moments_step(task: Task, state: TrainState, batch: PyTree) -> PyTree:
    """Computes batch statistics on clean training images, which are only cropped and flipped.

    Args:
      task: static.
      state: replicated.
      batch: one device's share of `pairing.train_batches` of the target alone.

    Returns:
      a tree like `state.batch_stats`: means and variances over the whole batch, on all devices.
    """
    _, images = augment.prepare_batch(task.config, Method(), batch, step=0, clean=True)
    _, moved = forward(task.graphdef, state.params, state.batch_stats, images['image'], train=True)
    return over_devices(batch_part(moved, state.batch_stats))


def input_step(task: Task, constants: PyTree, batch: PyTree) -> PyTree:
    """Computes the network's inputs in a training step, for reports.

    Args:
      task: static.
      constants: as in `train_step`.
      batch: one device's share of `pairing.train_batches`, with the images themselves.

    Returns:
      {'image' uint8 [B, H, W, 3], 'label' [B]}, gathered from all devices; and 'lam',
      'source_label' and 'other_label', [B] each, if the method has them.
    """
    config, method = config_with(task.config, constants), method_of(task.config)
    prepared = augment.prepare_batch(config, method, batch, step=0)
    inputs = method.transform(options_of(config), *prepared)
    seen = {key: inputs[key] for key in inputs.keys() & {'lam', 'source_label', 'other_label'}}
    count = len(inputs['label'])  # some methods append more images than labels
    seen |= {
        'image': augment.denormalize(inputs['image'][:count], config.model),
        'label': inputs['label'],
    }
    return jax.lax.all_gather(seen, 'batch', tiled=True)
