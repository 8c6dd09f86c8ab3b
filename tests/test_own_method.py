"""A method in a user's own file, or in an installed package."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file

from configs import digits
from tests.method_checks import LABELS_T, B, K, check, make_view, normal, outputs
from xmixup_jax.checks import validate
from xmixup_jax.cli import compare, export, predict, train
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.config import choose_method, digest, pretrain_config
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS, find
from xmixup_jax.run.train import train_and_evaluate

PAGE = Path(__file__).parents[1] / 'docs' / 'howto' / 'add_method.md'
EXAMPLE = re.search(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[1]
NAME = 'poly'


@pytest.fixture(autouse=True)
def _nothing_loaded():
    """Clears the cached entry points, since each test has its own."""
    find._load_installed.cache_clear()
    yield
    find._load_installed.cache_clear()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The example of the documentation, alone in the current folder."""
    folder = tmp_path / 'mine'
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / f'{NAME}.py'
    path.write_text(EXAMPLE)
    return path


def small(config, *flags):
    """Flags of a short run of the digits experiment."""
    values = {key: config[key] for key in ('data_dir', 'cache_dir')}
    values |= {'weights': '', 'model.name': 'resnet6', 'model.width': 4, 'batch_size': 16}
    values |= {'eval_batch_size': 1024, 'report': False, 'steps': 2}
    return ['x', '--config=digits', *(f'--config.{k}={v}' for k, v in values.items()), *flags]


def message_of(*flags, file='digits'):
    with pytest.raises(ConfigError) as info:
        validate(parse_flags(['x', f'--config={file}', *flags])[0], num_devices=8)
    assert '\n' not in str(info.value)
    return str(info.value)


def test_the_documented_file_trains_in_an_empty_folder(config, file, capsys):
    train.run(small(config, f'--config.method={file.name}', f'--config.{NAME}.epsilon=0.2'))
    workdir = Path('runs') / f'digits-{NAME}-seed0'
    assert f'{NAME}  top1 ' in capsys.readouterr().out.replace('\r', '\n')
    assert json.loads((workdir / 'result.json').read_text())['method'] == NAME
    stored = json.loads((workdir / 'config.json').read_text())
    assert stored['method'] == str(file) and stored[NAME] == {'epsilon': 0.2}
    assert len(stored['method_digest']) == 12


@pytest.mark.parametrize('epsilon', [0.0, 0.1, 0.7])
def test_the_documented_loss_is_pytorchs(file, epsilon):
    found = find.find_method(file.name)
    config = digits.get_config()
    choose_method(config, file.name)
    assert config[NAME].to_dict() == {'epsilon': 1.0}
    config[NAME].epsilon = epsilon
    options = find.options_of(config)
    check(
        lambda z: found.method.loss(make_view(NAME, outputs=outputs(z), options=options)),
        lambda z: (
            F.cross_entropy(z, LABELS_T)
            + epsilon * (1 - z.softmax(1)[torch.arange(B), LABELS_T]).mean()
        ),
        normal(B, K),
    )


def test_a_run_continues_from_its_checkpoint_as_if_never_stopped(config, file, tmp_path):
    choose_method(config, file.name)
    run = tmp_path / 'run'
    result = train_and_evaluate(config, run)
    final = load_file(run / 'model.safetensors')
    (run / 'result.json').unlink()
    (run / 'model.safetensors').unlink()
    shutil.rmtree(run / 'checkpoints' / '6')  # continues from step 4
    again = train_and_evaluate(config, run)
    assert again['top1'] == result['top1']
    for key, tensor in load_file(run / 'model.safetensors').items():
        np.testing.assert_array_equal(tensor, final[key])


def test_a_run_knows_its_file_by_content(config, file, tmp_path):
    config.steps, config.checkpoint_every = 2, 2
    run = tmp_path / 'run'
    choose_method(config, file.name)
    result = train_and_evaluate(config, run)

    elsewhere = tmp_path / 'elsewhere' / file.name
    elsewhere.parent.mkdir()
    shutil.move(file, elsewhere)
    choose_method(config, str(elsewhere))
    assert train_and_evaluate(config, run) == result  # the finished run

    elsewhere.write_text(EXAMPLE.replace('return cross', 'return 2 * cross'))
    assert train_and_evaluate(config, run) == result  # the loaded method stays
    choose_method(config, str(elsewhere))
    view = make_view(NAME, outputs=outputs(jnp.zeros((B, K))), options=config[NAME])
    assert np.isclose(find.method_of(config).loss(view), 2 * np.log(K) + 1 - 1 / K)
    with pytest.raises(ConfigError, match=r'config\.method_digest: .* -> .*allow_changes'):
        train_and_evaluate(config, run)
    config.allow_changes, config.steps = True, 4
    assert train_and_evaluate(config, run)['steps'] == 4


def test_predictions_and_exports_need_no_file(config, file, capsys):
    train.run(small(config, f'--config.method={file.name}', '--workdir=run'))
    file.unlink()
    Image.new('L', (8, 8), 200).save('grey.png')
    capsys.readouterr()
    predict.run(['predict', '--workdir=run', '--format=json', '--top=10', 'grey.png'])
    (row,) = json.loads(capsys.readouterr().out)
    assert np.isclose(sum(each['probability'] for each in row['classes']), 1, atol=1e-4)
    export.run(['export', '--workdir=run', '--format=torch', '--output=exported.pth'])
    assert len(torch.load('exported.pth')['fc.bias']) == 10


def test_a_comparison_takes_files_and_names(config, file, tmp_path, capsys):
    flags = [f'--methods=finetune,{file.name}', '--seeds=0', f'--workdir={tmp_path / "compared"}']
    compare.run(small(config, *flags, f'--config.{NAME}.epsilon=0.3'))
    assert f'| `{NAME}` |' in capsys.readouterr().out
    stored = {
        name: json.loads((tmp_path / 'compared' / name / 'seed0' / 'config.json').read_text())
        for name in ('finetune', NAME)
    }
    assert stored[NAME][NAME] == {'epsilon': 0.3}
    # Fine-tuning has the same configuration as without the other method.
    plain, _ = parse_flags(small(config, '--config.method=finetune', '--config.precision=float32'))
    assert stored['finetune'] == plain.to_dict()


def test_an_experiment_can_choose_a_file_and_its_options(file):
    Path('mine.py').write_text(
        'from configs import digits\n'
        'def get_config():\n'
        '    config = digits.get_config()\n'
        f"    config.method, config.{NAME} = '{file.name}', {{'epsilon': 0.4}}\n"
        '    return config\n'
    )
    config, workdir = parse_flags(['x', '--config=mine.py'])
    assert (config.method, config[NAME].epsilon) == (str(file), 0.4)
    assert workdir == Path('runs') / f'mine-{NAME}-seed0'
    other, _ = parse_flags(['x', '--config=mine.py', '--config.method=xmixup'])
    assert other.to_dict() == parse_flags(['x', '--config=digits'])[0].to_dict()


def test_pretraining_is_shared_with_the_built_in_methods(file):
    plain, own = digits.get_config(), digits.get_config()
    choose_method(own, file.name)
    assert digest(pretrain_config(own)) == digest(pretrain_config(plain))
    assert digest(own) != digest(plain)
    choose_method(own, 'xmixup')
    assert own.to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'cannot be read (No such file or directory): give the path of a Python file'),
        ('x = 1\n', 'the file defines no METHOD: add METHOD = Method(...)'),
        ('METHOD = 3\n', 'METHOD is of type int: it must be a Method(...)'),
        ('\nimport nonsense\n', "ModuleNotFoundError: No module named 'nonsense', line 2): repair"),
        ('def f(:\n', 'SyntaxError: '),
        ('raise SystemExit(0)\n', 'SystemExit: 0, line 1)'),
        (EXAMPLE.replace('fraction(1.0', 'fraction(2'), 'the default 2.0 must be from 0 to 1'),
        (EXAMPLE.replace("'epsilon':", "'items':"), "'items' cannot be a part of config.METHOD"),
        (EXAMPLE.replace("fraction(1.0, 'weight of the first polynomial')", '0.1'),
         "the option 'epsilon' is of type float: it must come from xmixup_jax.methods.options"),
        (EXAMPLE.replace('loss=loss', 'lose=loss'), "unexpected keyword argument 'lose'"),
    ],
)  # fmt: skip
def test_broken_files_end_in_one_line(file, content, words):
    path = Path('broken.py')
    if content is not None:
        path.write_text(content)
    message = message_of(f'--config.method={path}')
    assert message.startswith('config.method=') and str(path.absolute()) in message
    assert words in message


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('xmixup.py', 'xmixup is a built-in method: rename the file'),
        ('finetune.py', 'finetune is a built-in method: rename the file'),
        ('match.py', 'the name config.match is taken by another method or key'),
        ('steps.py', 'the name config.steps is taken by another method or key'),
        ('update.py', "'update' cannot be a part of config.METHOD.KEY"),
        ('my-method.py', "'my-method' cannot be a part of config.METHOD.KEY"),
        ('lambda.py', "'lambda' cannot be a part of config.METHOD.KEY"),
    ],
)
def test_names_that_are_taken(file, name, words):
    file.rename(name)
    assert words in message_of(f'--config.method={name}')


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ([f'--config.{NAME}.epsilon=2'], f'config.{NAME}.epsilon=2.0: must be from 0 to 1'),
        ([f'--config.{NAME}.epsilon=-1'], f'config.{NAME}.epsilon=-1.0: must be from 0 to 1'),
        ([f'--config.{NAME}.epsilon=nan'], f'config.{NAME}.epsilon=nan: must be from 0 to 1'),
        ([f'--config.{NAME}.epsilno=0.1'], f'did you mean config.{NAME}.epsilon'),
        (['--config.method=mixup', f'--config.{NAME}.epsilon=0.1'], 'there is no such key'),
        (['--config.method', 'nowhere/poly.py'], 'nowhere/poly.py'),
        (['--config.method=poly.txt'], 'must be one of finetune, l2sp'),
    ],
)
def test_wrong_flags(file, flags, words):
    assert words in message_of(f'--config.method={file.name}', *flags)


def test_two_files_of_one_name_are_not_compared(config, file, tmp_path):
    other = Path('other') / file.name
    other.parent.mkdir()
    other.write_text(EXAMPLE.replace('0.1', '0.2'))
    flags = [f'--methods={file.name},{other}', f'--workdir={tmp_path / "compared"}']
    with pytest.raises(ConfigError, match=f'the name config.{NAME} is taken by another method'):
        compare.run(small(config, *flags))


def test_a_name_set_by_hand_needs_its_options(file):
    config = digits.get_config()
    config.method = file.name
    with pytest.raises(ConfigError, match=r'use xmixup_jax\.config\.choose_method'):
        validate(config, 8)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages with these entry points are installed."""

    def install(*values):
        points = importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, value, find.GROUP) for name, value in values
        )
        monkeypatch.setattr(
            importlib.metadata, 'entry_points', lambda group: points.select(group=group)
        )

    return install


def test_a_method_of_an_installed_package(config, file, tmp_path, monkeypatch, installed):
    monkeypatch.syspath_prepend(file.parent)
    file.rename('package_of_mine.py')
    installed((NAME, 'package_of_mine:METHOD'))
    flags = small(config, f'--config.method={NAME}', f'--config.{NAME}.epsilon=0.2')
    parsed, workdir = parse_flags(flags)
    validate(parsed, 8)
    assert (parsed.method, parsed[NAME].epsilon) == (NAME, 0.2) and 'method_digest' not in parsed
    assert workdir == Path('runs') / f'digits-{NAME}-seed0'
    result = train_and_evaluate(parsed, tmp_path / 'run')
    assert result['method'] == NAME and np.isfinite(result['loss'])
    assert f'config.{NAME}.epsilon=3.0: must be from 0 to 1' in message_of(
        *flags[2:], f'--config.{NAME}.epsilon=3'
    )


@pytest.mark.parametrize(
    ('method', 'points', 'words'),
    [
        ('mine', [('mine', 'nonsense:METHOD')], "ModuleNotFoundError: No module named 'nonsense'"),
        ('mine', [('mine', 'math:METHOD')], 'AttributeError: '),
        ('mine', [('mine', 'math:pi')], 'is of type float: it must be a Method'),
        ('mine', [('mine', 'math:pi'), ('mine', 'math:e')], 'is not the only one of this name'),
        ('xmixup', [('xmixup', 'math:pi')], 'has the name of a built-in method'),
        ('match', [('match', 'xmixup_jax.methods.mixup:METHOD')], 'the name config.match is taken'),
        ('mine', [('other', 'math:pi')], 'must be one of finetune'),
    ],
)
def test_broken_entry_points_end_in_one_line(installed, method, points, words):
    installed(*points)
    message = message_of(f'--config.method={method}')
    assert message.startswith('config.method=') and words in message


def test_built_in_methods_know_nothing_of_their_names():
    for name in METHODS:
        path = Path(find.__file__).with_name(f'{name}.py')
        code = path.read_text().split('"""', 2)[2]
        assert f'config.{name}' not in code and f"'{name}'" not in code, name
