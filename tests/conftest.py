"""Simulated devices and a small network for every test, and data that the tests share."""

import os
import shutil

from environment import DEVICES, simulated

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests spend most of their time compiling, for a few steps of a tiny network.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['XLA_FLAGS'] = simulated(DEVICES)

import jax
import psutil
import pytest
from hypothesis import settings

from configs import digits
from xmixup_jax.compute.step import create_task
from xmixup_jax.data.selection import train_and_test, train_records
from xmixup_jax.methods.base import Sizes
from xmixup_jax.models import MODELS, convnext, resnet, vit
from xmixup_jax.run.memory import release_memory
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights

# Two stages with one block each: half as many layers to compile as in resnet10.
resnet.DEPTHS['resnet6'] = resnet.Variant((1, 1), False)
MODELS['resnet6'] = MODELS['resnet10']
# Small networks of the other families, with fewer and narrower layers of the same kind.
convnext.SIZES['convnext4'] = ((1, 2, 1, 1), 8)
MODELS['convnext4'] = MODELS['convnext_tiny']
for small, like in {'dinov2_4': 'dinov2_s14_reg4', 'clip4': 'clip_b16_quickgelu'}.items():
    vit.VARIANTS[small] = vit.VARIANTS[like]._replace(width=16, heads=2, depth=4)
    MODELS[small] = MODELS[like]

# Disabled in this process, whatever a test sets up: XLA can crash when it writes hundreds of
# programs for several simulated devices, and writing takes longer than compiling the few programs
# that are compiled twice.
jax.config.update('jax_enable_compilation_cache', False)

settings.register_profile('xmixup', deadline=None, max_examples=50)
settings.load_profile('xmixup')


def pytest_addoption(parser):
    parser.addoption('--faults', type=int, default=1, help='multiplies the faults in tests/faults')


def pytest_terminal_summary(terminalreporter):
    """Prints what the tests in tests/faults have counted."""
    for report in terminalreporter.getreports('passed'):
        for name, value in report.user_properties:
            terminalreporter.write_line(f'{name}: {value}')


@pytest.fixture(scope='module', autouse=True)
def little_memory():
    """Clears the compiled programs between two test files if they fill the memory."""
    yield
    if psutil.Process().memory_info().rss > 2e9:
        jax.clear_caches()
        release_memory()


@pytest.fixture
def faults(request):
    """The factor for the usual number of faults, see --faults."""
    return request.config.getoption('faults')


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """Data and cache folders of the whole test session, empty at its start."""
    root = tmp_path_factory.mktemp('shared')
    return {'data_dir': str(root / 'tfds'), 'cache_dir': str(root / 'cache')}


def small_experiment(folders):
    config = digits.get_config()
    config.update(folders)
    config.weights = ''
    config.model.name = 'resnet6'
    config.model.width = 4
    config.steps = 6
    config.batch_size = 16
    config.eval_batch_size = 1024
    config.log_every = 2
    config.checkpoint_every, config.checkpoint_seconds = 4, 0.0
    config.report = False  # tested in tests/test_report.py
    return config


@pytest.fixture
def config(folders):
    """The digits experiment: a few steps of a tiny network without pre-training."""
    return small_experiment(folders)


@pytest.fixture(scope='session')
def one_finished_run(folders, tmp_path_factory):
    """(configuration, folder, result) of a run with tests during training and three checkpoints."""
    config = small_experiment(folders)
    config.update({'method': 'xmixup', 'eval_every': 2, 'checkpoint_every': 2})
    config.update({'keep_checkpoints': 3, 'reestimate': 0})
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    return config, workdir, train_and_evaluate(config, workdir)


@pytest.fixture
def finished_run(one_finished_run, tmp_path):
    """Copies of `one_finished_run` that a test may change."""
    config, workdir, result = one_finished_run
    copy = shutil.copytree(workdir, tmp_path / 'finished')
    return config.copy_and_resolve_references(), copy, dict(result)


@pytest.fixture
def pretrained(config, tmp_path_factory):
    """The weights file of a network with ten classes, as pre-training would write it."""
    path = tmp_path_factory.getbasetemp() / 'pretrained.safetensors'
    if not path.exists():
        config.method = 'finetune'
        _, state = create_task(config, Sizes(10))
        names = {'class_names': [str(digit) for digit in range(10)]}
        save_weights(path, config.model.name, state.params, state.batch_stats, names)
    return path


@pytest.fixture
def records(config):
    """(target, test, source) of the digits experiment."""
    target, test = train_and_test(config.target, config)
    return target, test, train_records(config.source, config)
