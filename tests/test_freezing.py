"""Frozen stages and backbones, linear probes, and the moving average of the weights."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch_networks import peer

from tests.test_backbones import randomized
from tests.test_step import one_and_many_devices, random_batch
from xmixup_jax.checks import validate
from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.augment import normalize
from xmixup_jax.compute.state import update_average, with_average
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Sizes
from xmixup_jax.methods.find import with_traced
from xmixup_jax.run.inputs import open_data
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import torch_tensors
from xmixup_jax.weights.pretrained import Weights

STAYS = ('conv1', 'bn1', 'layer1', 'layer2')


def test_a_step_is_pytorchs_with_frozen_layers(config, tmp_path):
    """One SGD step of torchvision's ResNet-18, its first two stages without gradient and in
    evaluation mode."""
    torch.manual_seed(0)
    network = randomized(peer('resnet18', 10, 64))
    save_file(network.state_dict(), tmp_path / 'w.safetensors')
    config.update({'method': 'finetune', 'freeze': '2', 'image_size': 64, 'resize': 64})
    config.model.update({'name': 'resnet18', 'width': 64, 'stem': 'imagenet'})
    config.flip, config.optimizer.weight_decay = False, 0.01
    task, state = step_lib.create_task(config, Sizes(10))
    filled = Weights(tmp_path / 'w.safetensors', 'resnet18').fill(
        state.params, state.batch_stats, with_head=True
    )
    state = replace(state, params=filled[0], batch_stats=filled[1])
    batch = random_batch(8)
    batch['image'] = np.random.default_rng(2).integers(0, 256, (8, 64, 64, 3), np.uint8)
    ((ours, _),) = one_and_many_devices(task, with_traced({}, config), state, [batch], counts=(1,))

    network.train()
    for name in STAYS:
        network.get_submodule(name).eval().requires_grad_(False)
    trained = [each for each in network.parameters() if each.requires_grad]
    options = config.optimizer
    sgd = torch.optim.SGD(
        trained, options.learning_rate, options.momentum, 0, options.weight_decay, options.nesterov
    )
    pixels = np.asarray(normalize(batch['image'], config.model)).transpose(0, 3, 1, 2)
    loss = torch.nn.functional.cross_entropy(
        network(torch.tensor(pixels)), torch.tensor(batch['label'], dtype=torch.long)
    )
    loss.backward()
    sgd.step()

    found = torch_tensors('resnet18', ours.params, ours.batch_stats)
    before = load_file(tmp_path / 'w.safetensors')
    for key, expected in network.state_dict().items():
        if key.endswith('num_batches_tracked'):
            continue
        if key.endswith('running_var'):  # PyTorch's is unbiased
            continue
        np.testing.assert_allclose(found[key], expected.numpy(), rtol=1e-3, atol=1e-4, err_msg=key)
    for key, value in before.items():
        if key.startswith(STAYS) and key in found:
            np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_frozen_parameters_have_no_state_in_the_optimiser(config):
    config.update({'method': 'finetune', 'freeze': '1', 'weights': 'source'})
    task, state = step_lib.create_task(config, Sizes(10))
    trained = [
        leaf
        for leaf, frozen in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(task.frozen), strict=True
        )
        if not frozen
    ]
    assert 0 < len(trained) < len(jax.tree.leaves(state.params))
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in momentum] == [leaf.shape for leaf in trained]


@pytest.mark.parametrize('norm', ['batch', pytest.param('mixed', marks=pytest.mark.slow)])
def test_a_run_keeps_what_is_frozen(config, pretrained, tmp_path, norm):
    """Parameters and statistics; the statistics of other layers are re-estimated."""
    config.update(
        {'method': 'xmixup', 'weights': str(pretrained), 'freeze': '1', 'batch_norm': norm}
    )
    train_and_evaluate(config, tmp_path)
    before, after = load_file(pretrained), load_file(tmp_path / 'model.safetensors')
    same = {key for key in before if np.array_equal(before[key], after[key])}
    assert {key for key in same if 'layer2' not in key} == {
        key for key in before if key.startswith(('conv1', 'bn1', 'layer1'))
    }
    assert not {key for key in same if key.startswith('fc')}
    assert not np.array_equal(
        before['layer2.0.bn1.running_mean'], after['layer2.0.bn1.running_mean']
    )


def test_a_linear_probe_is_scikit_learns_and_takes_no_steps(config, pretrained, tmp_path):
    config.update({'method': 'finetune', 'weights': str(pretrained), 'freeze': 'backbone'})
    result = train_and_evaluate(config, tmp_path)
    assert (result['steps'], result['images_per_second']) == (0, None)
    before, after = load_file(pretrained), load_file(tmp_path / 'model.safetensors')
    for key in before:
        if not key.startswith('fc'):
            np.testing.assert_array_equal(before[key], after[key])
    data = open_data(config)
    network, state = trained_network(config, tmp_path)
    features = features_of(config, network, state, data)
    expected = LogisticRegression(max_iter=1000).fit(features['target'][0], features['target'][1])
    accuracy = expected.score(*features['test'])
    assert result['top1'] == pytest.approx(accuracy, abs=2 / len(data.test))
    assert train_and_evaluate(config, tmp_path) == result


def trained_network(config, workdir):
    task, state = step_lib.create_task(config, Sizes(10))
    filled = Weights(workdir / 'model.safetensors', config.model.name).fill(
        state.params, state.batch_stats, with_head=True
    )
    return task, replace(state, params=filled[0], batch_stats=filled[1])


def features_of(config, task, state, data):
    from xmixup_jax.compute.features import outputs_of
    from xmixup_jax.devices import replicate

    found = {}
    for part, records in data.parts().items():
        outputs = outputs_of(task, config, replicate(state), records)
        found[part] = outputs['features'], outputs['label']
    return found


@pytest.mark.parametrize(
    'method', ['xmixup', *(pytest.param(m, marks=pytest.mark.slow) for m in ('mixup', 'rifle'))]
)
def test_other_methods_train_the_head_on_a_frozen_backbone(config, pretrained, tmp_path, method):
    config.update({'method': method, 'weights': str(pretrained), 'freeze': 'backbone'})
    config.optimizer.layer_decay = 0.5
    result = train_and_evaluate(config, tmp_path)
    assert result['steps'] == config.steps
    before, after = load_file(pretrained), load_file(tmp_path / 'model.safetensors')
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {'fc.weight', 'fc.bias'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'freeze': 'no'}, 'or the number of stages'),
        ({'freeze': '0'}, 'or the number of stages'),
        ({'freeze': '1', 'weights': ''}, "config.weights='' is a random network"),
        ({'freeze': 'backbone', 'ema_decay': 0.9}, 'config.ema_decay=0.9 has no effect'),
        ({'freeze': 'backbone', 'balance.weights': 'inverse'}, 'has no effect in a linear probe'),
        ({'ema_decay': 1.0}, 'from 0 to below 1'),
    ],
)
def test_impossible_choices_are_refused(config, changes, message):
    config.update({'method': 'finetune', 'weights': 'source'})
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)


def test_more_stages_than_there_are_is_one_clear_line(config):
    config.update({'freeze': '3', 'weights': 'source'})
    with pytest.raises(ConfigError, match=r'config.freeze=3: the network has only 2 stages'):
        step_lib.create_task(config, Sizes(10))


@pytest.mark.parametrize('method', METHODS)
def test_methods_that_act_on_the_backbone_refuse_a_frozen_one(config, method):
    config.update({'method': method, 'weights': 'source', 'freeze': 'backbone'})
    if method in ('finetune', 'xmixup', 'mixup', 'cutmix', 'rifle', 'bituning'):
        validate(config, 1)
        return
    with pytest.raises(ConfigError, match='changes the backbone'):
        validate(config, 1)


def test_the_average_follows_as_in_its_definition():
    """Against PyTorch's AveragedModel with the same rule."""
    network = torch.nn.Linear(3, 2)

    def rule(averages, current, count):
        t = int(count)  # updates of the average before this one
        kept = min(0.8, (1 + t) / (10 + t))
        return kept * averages + (1 - kept) * current

    average = torch.optim.swa_utils.AveragedModel(network, avg_fn=rule)
    average.update_parameters(network)  # the first one copies
    first = network.weight.detach().numpy().copy()
    state = with_average(step_lib.TrainState(np.int32(0), {'w': first}, {}, (), {}))
    for step in range(1, 50):
        with torch.no_grad():
            network.weight += torch.randn(2, 3)
        average.update_parameters(network)
        params = {'w': network.weight.detach().numpy().copy()}
        state = replace(state, step=np.asarray(step, np.int32), params=params)
        state = update_average(state, 0.8)
        expected = average.module.weight.detach().numpy()
        np.testing.assert_allclose(state.average['params']['w'], expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_has_the_same_average(config, pretrained, tmp_path):
    config.update({'method': 'smile', 'weights': str(pretrained), 'ema_decay': 0.9})
    whole = train_and_evaluate(config, tmp_path / 'whole')
    assert whole['ema_loss'] != whole['loss']
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
    for name in ('result.json', 'ema_model.safetensors'):
        (tmp_path / 'again' / name).unlink()
    again = train_and_evaluate(config, tmp_path / 'again')
    assert again['ema_loss'] == whole['ema_loss']
    ours, theirs = (
        load_file(tmp_path / run / 'ema_model.safetensors') for run in ('whole', 'again')
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_checkpoints_without_an_average_are_refused_in_words(config, pretrained, tmp_path):
    config.update({'method': 'finetune', 'weights': str(pretrained)})
    train_and_evaluate(config, tmp_path)
    config.update({'ema_decay': 0.9, 'allow_changes': True})
    with pytest.raises(ConfigError, match=r'config.ema_decay cannot change'):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ('name', 'stages', 'first', 'next_one'),
    [
        ('convnext4', '1', ('stem', 'stages.0.'), 'stages.1.downsample'),
        ('dinov2_4', '2', ('cls_token', 'reg_token', 'pos_embed', 'blocks.1.'), 'blocks.2.'),
        ('clip4', '1', ('norm_pre', 'patch_embed', 'blocks.0.'), 'blocks.1.'),
        ('efficientnet_lite0', '3', ('conv_stem', 'blocks.0.', 'blocks.2.1'), 'blocks.3.0'),
        pytest.param(
            *('inception_v3', '1', ('Conv2d_1a_3x3',), 'Mixed_5b'), marks=pytest.mark.slow
        ),
    ],
)
def test_stages_are_those_of_the_network(config, name, stages, first, next_one):
    """A stage and everything before it are frozen; nothing behind it is, not even norms."""
    config.update({'freeze': stages, 'weights': 'source', 'method': 'finetune'})
    config.image_size = config.resize = 84 if name == 'inception_v3' else 64
    if name == 'dinov2_4':
        config.image_size = config.resize = 28
    config.model.update({'name': name, 'width': 64, 'stem': 'imagenet'})
    task = step_lib.make_task(config, Sizes(10))
    frozen = {
        '.'.join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree.leaves_with_path(task.frozen)
    }
    assert all(any(key.startswith(each) for key in frozen) for each in (*first, next_one))
    assert all(leaf for key, leaf in frozen.items() if key.startswith(first))
    assert not any(leaf for key, leaf in frozen.items() if key.startswith((next_one, 'fc')))


def test_the_backward_pass_ends_where_the_frozen_part_begins(config):
    """XLA counts fewer operations for a step."""

    def flops(freeze):
        config.update({'method': 'mixup', 'weights': 'source', 'freeze': freeze})
        task, state = step_lib.create_task(config, Sizes(10))
        step = jax.vmap(
            partial(step_lib.train_step, task, with_traced({}, config)),
            axis_name='batch',
            in_axes=(None, 0),
            out_axes=None,
        )
        batch = jax.tree.map(lambda x: x[None], random_batch(16))
        return jax.jit(step).lower(state, batch).cost_analysis()['flops']

    none, stage, backbone = (flops(freeze) for freeze in ('', '1', 'backbone'))
    assert backbone < stage < none
    assert backbone < 0.5 * none  # about a third: the forward pass
