"""The first seconds of a command: signals while libraries are imported, devices that are not there.

An import hook sends the signal when a given module is imported, so nothing depends on timing.
"""

import signal
import subprocess
import sys

import pytest
from environment import one_device

from xmixup_jax.compute import step as step_lib
from xmixup_jax.methods.base import Sizes
from xmixup_jax.weights.files import save_weights

CODE = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            print('reached', flush=True)
            os.kill(os.getpid(), {number})
        return None

sys.meta_path.insert(0, Finder)
from xmixup_jax.cli.program import main
main({arguments!r})
"""
# In the order of their import; the last one is imported inside a command, long after the start.
MODULES = (
    'xmixup_jax.cli.train',
    'absl',
    'numpy',
    'numpy._core.multiarray',
    'jax',
    'jax._src.core',
    'jaxlib.xla_client',
    'flax',
    'xmixup_jax.run.train',
)


@pytest.mark.parametrize(
    ('module', 'number'),
    [*((module, signal.SIGINT) for module in MODULES), ('jax', signal.SIGTERM)],
)
def test_a_signal_during_imports_is_one_line(module, number):
    code = CODE.format(module=module, number=int(number), arguments=['train', '--config=digits'])
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False, env=one_device()
    )
    if 'reached' not in done.stdout:
        pytest.fail(f'{module} is not imported: {done.stderr}')
    assert done.returncode == 75
    assert done.stderr == 'xmixup: stopped by a signal: run the same command to resume\n'


@pytest.mark.parametrize(
    ('command', 'variable'),
    [('train', 'JAX_PLATFORMS'), ('train', 'JAX_PLATFORM_NAME'), ('predict', 'JAX_PLATFORMS')],
)
def test_a_device_that_is_not_there(command, variable, config, tmp_path):
    arguments = [f'--workdir={tmp_path}', '--config=digits', '--config.weights=']
    if command == 'predict':
        arguments = [f'--workdir={untrained(config, tmp_path)}', __file__]
    environment = one_device()
    environment.pop('JAX_PLATFORMS', None)
    done = subprocess.run(
        [sys.executable, '-m', 'xmixup_jax', command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {variable: 'cdua'},
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'xmixup: {variable}=cdua: JAX finds no such device')
    assert f'unset {variable} or set it to cpu' in line


def untrained(config, folder):
    """Makes a run folder with random weights of a network that is not only defined in tests."""
    config.model.name = 'resnet10'
    _, state = step_lib.create_task(config, Sizes(10, 10))
    content = {'class_names': tuple('abcdefghij'), 'config': config.to_dict()}
    path = folder / 'model.safetensors'
    save_weights(path, config.model.name, state.params, state.batch_stats, content)
    return folder
