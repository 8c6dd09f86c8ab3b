"""The examples in docstrings and documents do what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

import xmixup_jax
from xmixup_jax import losses
from xmixup_jax.compute.step import create_task
from xmixup_jax.methods.base import Sizes
from xmixup_jax.weights.files import save_weights

MODULES = [module.name for module in pkgutil.walk_packages(xmixup_jax.__path__, 'xmixup_jax.')]
WITH_EXAMPLES = [name for name in MODULES if '>>>' in Path(
    importlib.util.find_spec(name).origin).read_text()]  # fmt: skip
DOCS = Path(__file__).parents[1] / 'docs'
# The folders that Sphinx writes begin with an underscore.
PAGES = sorted(
    path for path in DOCS.rglob('*.md') if not path.relative_to(DOCS).as_posix().startswith('_')
)


@pytest.fixture
def example_files(config, tmp_path, monkeypatch):
    """What the examples read: weights.safetensors, the run runs/example, and image.png."""
    monkeypatch.chdir(tmp_path)
    Path('runs/example').mkdir(parents=True)
    config.method, config.model.name = 'finetune', 'resnet10'
    _, state = create_task(config, Sizes(2))
    params = state.params | {'fc': {'kernel': np.zeros((32, 2)), 'bias': np.array([0.0, 5.0])}}
    content = {'class_names': ('dog', 'cat'), 'config': config.to_dict()}
    for path in (Path('weights.safetensors'), Path('runs/example/model.safetensors')):
        save_weights(path, config.model.name, params, state.batch_stats, content)
    cv2.imwrite('image.png', np.zeros((40, 30, 3), np.uint8))


@pytest.mark.parametrize('name', WITH_EXAMPLES)
def test_docstrings(name, example_files):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_documents(path, example_files):
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert not failed and (tried or '>>>' not in path.read_text())


def test_everything_public_has_an_example():
    functions = [getattr(xmixup_jax, name) for name in xmixup_jax.__all__ if name != 'losses']
    functions += [getattr(losses, name) for name in losses.__all__ if name != 'head_norm']
    for function in functions:
        assert re.search('>>> .*' + function.__name__, function.__doc__), function
    with pytest.raises(AttributeError, match='no attribute'):
        xmixup_jax.no_such_thing  # noqa: B018
