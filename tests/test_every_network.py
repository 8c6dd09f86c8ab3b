"""Whole runs of methods that use feature maps, on a small network of each family."""

import numpy as np
import pytest
from torch_networks import SMALL

from xmixup_jax.checks import validate
from xmixup_jax.compute import step as step_lib
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import MODELS
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights

# The methods that read or change feature maps, with options.
LOOKING: dict[str, dict] = {'delta': {}, 'fsp': {}, 'smile': {}, 'xmixup': {'xmixup.mix_at': 2}}
QUICK = (('dinov2_4', 'xmixup'),)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('networks')


def set_network(config, name):
    config.model.update({'name': name, 'width': 64, 'stem': 'imagenet'})
    size = max(MODELS[name].min_size, 2 * MODELS[name].multiple)
    config.update({'resize': size, 'image_size': size})


def weights(config, folder):
    """A weights file for the configuration's network, with a head."""
    path = folder / config.model.name
    if not path.exists():
        config.method = 'finetune'
        _, state = step_lib.create_task(config, Sizes(10))
        save_weights(path, config.model.name, state.params, state.batch_stats, {})
    return str(path)


@pytest.mark.parametrize(
    ('name', 'method'),
    [
        pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
        for name in SMALL
        for method in LOOKING
    ],
)
def test_methods_that_look_into_the_network(config, folder, tmp_path, name, method):
    set_network(config, name)
    config.weights = weights(config, folder)
    config.method = method
    config.update({'steps': 2, 'checkpoint_every': 2})
    config.update_from_flattened_dict(LOOKING[method])
    result = train_and_evaluate(config, tmp_path)
    assert np.isfinite(result['loss']) and 0 <= result['top1'] <= 1


@pytest.mark.parametrize('name', [name for name in MODELS if not MODELS[name].has_batch_norm])
def test_methods_of_batch_norm_are_refused(config, name):
    set_network(config, name)
    config.method = 'stochnorm'
    assert METHODS['stochnorm'].norm
    with pytest.raises(ConfigError, match=f'but {name} has no batch norm'):
        validate(config, 1)
