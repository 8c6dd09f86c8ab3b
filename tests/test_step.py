import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
import scipy.special

from xmixup_jax.compute import mapping
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.evaluation import evaluate
from xmixup_jax.compute.features import class_means
from xmixup_jax.compute.mapping import map_train_steps
from xmixup_jax.devices import replicate, shard, shard_steps
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced
from xmixup_jax.models import forward
from xmixup_jax.optimizer import make_optimizer, make_schedule

SIZES = Sizes(target=10, source=10, pretrained=10)


def random_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(0, 256, (size, 22, 22, 3), np.uint8),
        'source_image': rng.integers(0, 256, (size, 22, 22, 3), np.uint8),
        'label': rng.integers(0, 10, size).astype(np.int32),
        'source_label': rng.integers(0, 10, size).astype(np.int32),
        'seed': rng.integers(0, 2**32, size, np.uint32),
    }


def one_and_many_devices(task, constants, state, batches, counts=None):
    """[(state, metrics)] after steps on each number of devices."""
    results = []
    for count in counts or (1, jax.device_count()):
        step = jax.pmap(
            partial(step_lib.train_step, task),
            axis_name='batch',
            in_axes=(None, None, 0),
            out_axes=None,
            devices=jax.devices()[:count],
        )
        current = jax.tree.map(np.asarray, state)
        for batch in batches:
            split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)  # noqa: B023
            current, metrics = jax.device_get(step(constants, current, split))
        results.append((current, metrics))
    return results


@pytest.mark.devices
@pytest.mark.parametrize('method', ['finetune', 'xmixup'])
def test_one_and_many_devices_give_the_same_update(config, method):
    assert jax.device_count() > 1
    config.method, config.flip = method, True
    task, state = step_lib.create_task(config, SIZES)
    batches = [random_batch(16, seed) for seed in range(2)]
    (one, one_metrics), (many, many_metrics) = one_and_many_devices(
        task, with_traced({}, config), state, batches
    )
    assert int(one.step) == int(many.step) == 2
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (one.params, one.batch_stats), (many.params, many.batch_stats))
    jax.tree.map(close, one_metrics, many_metrics)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.devices
def test_shard_map_is_ready_to_take_the_place_of_pmap(config, records, monkeypatch):
    """Both mappings give the same updates, logits and inputs, bit for bit."""
    _, test, _ = records
    test = test.select(np.arange(77))
    batches = [random_batch(16, seed) for seed in range(2)]

    def outcome():
        task, state = step_lib.create_task(config, SIZES)
        task = dataclasses.replace(task)  # a copy has no cached mapping
        constants = with_traced({}, config)
        state, metrics = task.train_steps(constants, replicate(state), {}, shard_steps(batches))
        tested = evaluate(task, config, state, test)
        return state, metrics, tested.logits, task.input_step(constants, shard(batches[0]))

    expected = outcome()
    monkeypatch.setattr(mapping, 'over_devices', mapping.by_shard_map)
    jax.tree.map(np.testing.assert_array_equal, outcome(), expected)


@pytest.mark.devices
def test_the_mapped_step_donates_and_replicates(config):
    task, state = step_lib.create_task(config, SIZES)
    step = map_train_steps(partial(step_lib.train_steps, task))
    old = replicate(state)
    new, _ = step(with_traced({}, config), old, {}, shard_steps([random_batch(16)]))
    jax.block_until_ready(new)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(new))
    for leaf in jax.tree.leaves((new.params, new.opt_state)):
        first = np.asarray(leaf.addressable_shards[0].data)
        for copy in leaf.addressable_shards[1:]:
            np.testing.assert_array_equal(first, np.asarray(copy.data))


@pytest.mark.devices
def test_evaluation_is_exact_for_a_partly_filled_batch(config, records):
    _, test, _ = records
    config.eval_batch_size = 64
    test = test.select(np.arange(77))  # 51 of 128 positions are padding
    task, state = step_lib.create_task(config, SIZES)
    tested = evaluate(task, config, replicate(state), test)
    metrics = tested.metrics
    np.testing.assert_array_equal(tested.index, np.arange(77))

    from xmixup_jax.compute.augment import evaluation_view
    from xmixup_jax.data.decode import decode

    images = np.stack([decode(test.read(test.index[i]), config.resize, '') for i in range(77)])
    images = evaluation_view(config, images)
    outputs, _ = forward(task.graphdef, state.params, state.batch_stats, images, train=False)
    logits = np.asarray(outputs.logits, np.float64)[:, :10]
    log_p = scipy.special.log_softmax(logits, axis=1)
    assert metrics['top1'] == np.mean(logits.argmax(1) == test.labels)
    np.testing.assert_allclose(
        metrics['loss'], -log_p[np.arange(77), test.labels].mean(), rtol=1e-5
    )

    means = class_means(task, config, replicate(state), test)
    features = np.asarray(outputs.features)
    expected = np.stack([features[test.labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


def test_optimizer_is_pytorchs_sgd(config):
    """Against the update rule in torch.optim.SGD's documentation, in NumPy."""
    config.optimizer.head_multiplier = 10.0
    config.optimizer.weight_decay = 0.01
    tx = make_optimizer(config.optimizer, steps=10)
    rng = np.random.default_rng(0)
    params = {name: {'kernel': rng.normal(size=(3, 2))} for name in ('conv1', 'fc')}
    state = tx.init(params)
    expected, momentum = dict(params), dict.fromkeys(params, 0.0)
    for i in range(10):
        grads = {name: {'kernel': rng.normal(size=(3, 2))} for name in params}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            lr = (
                0.02 * (10 if name == 'fc' else 1) * (0.1 if i >= 7 else 1)
            )  # 0.67 x 10 rounds to 7
            g = grads[name]['kernel'] + 0.01 * expected[name]['kernel']
            momentum[name] = 0.9 * momentum[name] + g
            step = g + 0.9 * momentum[name]  # Nesterov
            expected[name] = {'kernel': expected[name]['kernel'] - lr * step}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), params, expected)


def test_learning_rates_share_a_compiled_step_and_keep_their_own_rate(config):
    config.update({'method': 'finetune', 'flip': True})
    states, moves = [], []
    for rate in (0.02, 0.005):
        config.optimizer.learning_rate = rate
        task, state = step_lib.create_task(config, SIZES)
        states.append((task, state))
        ((after, _),) = one_and_many_devices(
            task, with_traced({}, config), state, [random_batch(16)], counts=(1,)
        )
        moves.append(jax.tree.map(lambda a, b: a - np.asarray(b), after.params, state.params))
    assert states[0][0] is states[1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 4 * b, rtol=1e-2, atol=1e-6), *moves)


def test_coefficients_share_a_compiled_step_and_keep_their_own_value(config):
    """The gradient is linear in the weight of the penalty; at 0 it is that of fine-tuning."""
    config.update({'method': 'mmd', 'flip': True})
    found = {}
    for weight in (0.0, 0.5, 1.0):
        config.mmd.weight = weight
        task, state = step_lib.create_task(config, SIZES)
        constants = with_traced({}, config)
        ((after, _),) = one_and_many_devices(
            task, constants, state, [random_batch(16)], counts=(1,)
        )
        found[weight] = task, jax.tree.map(np.asarray, after.params)
    assert len({task for task, _ in found.values()}) == 1
    config.method = 'finetune'
    task, _ = step_lib.create_task(config, SIZES)
    ((plain, _),) = one_and_many_devices(
        task, with_traced({}, config), state, [random_batch(16)], counts=(1,)
    )
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6)
    jax.tree.map(close, found[0.0][1], jax.tree.map(np.asarray, plain.params))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, found[0.0][1], found[1.0][1])
    jax.tree.map(close, found[0.5][1], middle)
    assert any(
        np.abs(a - b).max() > 1e-4
        for a, b in zip(*(jax.tree.leaves(found[w][1]) for w in (0.0, 1.0)), strict=True)
    )


def test_decay_and_the_heads_rate_share_a_compiled_step_and_keep_their_own_value(config):
    """The first step of SGD is linear in both."""
    config.update({'method': 'finetune', 'flip': True})
    rate, tasks, after = config.optimizer.learning_rate, set(), {}
    for decay, multiplier in ((0.0, 1.0), (0.01, 1.0), (0.0, 10.0)):
        config.optimizer.update({'weight_decay': decay, 'head_multiplier': multiplier})
        task, state = step_lib.create_task(config, SIZES)
        constants = with_traced({}, config)
        ((new, _),) = one_and_many_devices(task, constants, state, [random_batch(16)], counts=(1,))
        tasks.add(task)
        after[decay, multiplier] = jax.tree.map(np.asarray, new.params)
    assert len(tasks) == 1
    start = jax.tree.map(np.asarray, state.params)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    factor = rate * 0.01 * (1 + config.optimizer.momentum)  # Nesterov
    decayed = jax.tree.map(lambda a, b: a - factor * b, after[0.0, 1.0], start)
    jax.tree.map(close, after[0.01, 1.0], decayed)
    moves = [jax.tree.map(np.subtract, after[0.0, m], start) for m in (1.0, 10.0)]
    heads = [each.pop('fc') for each in moves]
    jax.tree.map(partial(close, atol=2e-5), heads[1], jax.tree.map(lambda x: 10 * x, heads[0]))
    jax.tree.map(close, moves[1], moves[0])


def test_alpha_shares_a_compiled_step_and_keeps_its_own_value(config):
    """lam ~ Beta(alpha, alpha) is near 1/2 for a large alpha, and near 0 or 1 for a small one."""
    config.method, config.mixup.lam, lam, tasks = 'mixup', 'sample', {}, set()
    for config.mixup.alpha in (0.01, 1e4):
        task, _ = step_lib.create_task(config, SIZES)
        seen = task.input_step(with_traced({}, config), shard(random_batch(64)))
        tasks.add(task)
        lam[config.mixup.alpha] = np.asarray(seen['lam'])
    assert len(tasks) == 1
    assert np.abs(lam[1e4] - 0.5).max() < 0.05
    assert np.median(np.abs(lam[0.01] - 0.5)) > 0.49


def test_schedules(config):
    optimizer = config.optimizer
    optimizer.warmup_steps = 10
    rates = [float(make_schedule(optimizer, 100)(i)) for i in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10 * 0.02, rtol=1e-5)
    np.testing.assert_allclose(rates[10:67], 0.02, rtol=1e-5)
    np.testing.assert_allclose(rates[67:], 0.002, rtol=1e-5)
    optimizer.schedule, optimizer.warmup_steps = 'cosine', 0
    rates = [float(make_schedule(optimizer, 100)(i)) for i in range(100)]
    np.testing.assert_allclose(rates, 0.01 * (1 + np.cos(np.pi * np.arange(100) / 100)), atol=1e-8)
