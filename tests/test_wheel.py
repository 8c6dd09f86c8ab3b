"""The wheel, installed and used away from the repository."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from environment import HANGS, one_device

ROOT = Path(__file__).parents[1]
SOURCES = ('xmixup_jax', 'configs', 'tests', 'benchmarks')
FILES = ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, folder / 'source' / name, ignore=shutil.ignore_patterns('__pycache__')
        )
    for name in FILES:
        shutil.copy(ROOT / name, folder / 'source' / name)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, f'--wheel-dir={folder}', folder / 'source'], check=True)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def xmixup(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder."""
    folder = tmp_path_factory.mktemp('installed')
    venv.create(folder / 'venv', with_pip=False)
    python = folder / 'venv' / 'bin' / 'python'
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet']
    subprocess.run([*pip, '--no-deps', '--no-index', wheel], check=True)
    # The packages that it needs are those of the tests. What makes the repository importable
    # there, a .pth file, does not count in a folder that is itself named in one.
    (site,) = (folder / 'venv').glob('lib/python*/site-packages')
    (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
    empty = folder / 'empty'
    empty.mkdir()
    environment = {key: value for key, value in one_device().items() if key != 'PYTHONPATH'}

    def run(*arguments):
        command = [python.with_name('xmixup'), *arguments]
        return subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, timeout=HANGS
        )

    code = 'import xmixup_jax; print(xmixup_jax.__file__)'
    found = subprocess.run(
        [python, '-c', code], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    return run


def test_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split('/')[0] for name in names if '.dist-info/' not in name}
    assert tops == {'xmixup_jax'}  # no tests, no benchmarks
    # Everything that the repository's package has, and the experiments.
    for folder, place in (('xmixup_jax', 'xmixup_jax'), ('configs', 'xmixup_jax/configs')):
        expected = {
            f'{place}/{path.relative_to(ROOT / folder)}'
            for path in (ROOT / folder).rglob('*')
            if path.is_file() and path.suffix in ('.py', '.txt', '.html', '.jinja')
        }
        assert len(expected) > 5 and expected <= set(names)
    assert any(name.endswith('wordnet.txt') for name in names)
    assert any(name.startswith('xmixup_jax/report/') and '.html' in name for name in names)


def test_help(xmixup):
    done = xmixup('--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'xmixup train' in done.stdout


def tiny(config):
    """Flags of two steps of a small network."""
    values = {key: config[key] for key in ('data_dir', 'cache_dir')}
    values |= {'model.name': 'resnet10', 'model.width': 4, 'model.stem': 'cifar'}
    values |= {'resize': 22, 'image_size': 20, 'batch_size': 16, 'eval_batch_size': 512}
    values |= {'steps': 2, 'target.shots': 5, 'target.test_split': 'rest', 'weights': ''}
    return [f'--config.{key}={value}' for key, value in values.items()]


def test_an_installed_experiment_by_its_name(xmixup, config, records, tmp_path):
    done = xmixup('train', '--config=digits', f'--workdir={tmp_path / "run"}', *tiny(config))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('xmixup  top1 ')
    assert 'Class match' in (tmp_path / 'run' / 'report.html').read_text()


def test_a_file_of_three_keys(xmixup, config, records, tmp_path):
    file = tmp_path / 'mine.py'
    values = {'method': 'finetune', 'target': {'name': 'uci_digits'}, 'seed': 3}
    file.write_text(f'def get_config():\n    return {values}\n')
    command = ('train', f'--config={file}', f'--workdir={tmp_path / "run"}', *tiny(config))
    done = xmixup(*command, '--config.report=False')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('finetune  top1 ')

    file.write_text(f'def get_config():\n    return {values | {"stepz": 2}}\n')
    for wrong in (command, ('train', '--config=digits', '--config.stepz=2')):
        done = xmixup(*wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert 'stepz' in done.stderr and 'did you mean' in done.stderr
