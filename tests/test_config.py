import math
from pathlib import Path

import pytest

from configs import digits
from xmixup_jax.checks import validate
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.config import digest, flatten, pretrain_config
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods import METHODS

FILES = sorted(Path('configs').glob('[a-z]*.py'))


def parse(*flags, file='configs/digits.py'):
    return parse_flags(['main', f'--config={file}', *flags])


@pytest.mark.parametrize(
    'file', [f for f in FILES if f.stem not in ('default', '__init__')], ids=str
)
def test_every_experiment_is_valid_and_says_how_to_run_it(file):
    config, workdir = parse(file=str(file))
    validate(config, num_devices=8)
    validate(pretrain_config_complete(config), num_devices=8)
    assert workdir == Path('runs') / f'{file.stem}-xmixup-seed0'
    assert f'--config={file}' in file.read_text()


def pretrain_config_complete(config):
    """The derived configuration with the sections that only `validate` needs."""
    derived = pretrain_config(config).unlock()
    for key in ('pretrain', 'match', 'warm_head', 'reestimate', *METHODS):
        if key in config:
            derived[key] = config[key]
    derived.warm_head = False  # there are no pre-trained features yet
    derived.target.test_split = derived.target.test_split or 'train'
    return derived


def test_aircraft_is_the_full_experiment():
    config, _ = parse(file='configs/aircraft.py')
    assert (config.source.name, config.target.name) == ('imagenet2012', 'fgvc_aircraft')
    assert (config.model.name, config.model.width, config.model.stem) == (
        'resnet50',
        64,
        'imagenet',
    )
    assert (config.resize, config.image_size, config.method) == (256, 224, 'xmixup')


def test_overrides_reach_the_config():
    config, workdir = parse(
        '--config.xmixup.alpha=2', '--config.match.assignment=greedy', '--workdir=w'
    )
    assert (config.xmixup.alpha, config.match.assignment, workdir) == (2.0, 'greedy', Path('w'))


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--config.nonsense=1', '--config.nonsense=1: there is no such key'),
        ('--config.match.nonsense=1', '--config.match.nonsense=1: there is no such key'),
        ('--config.model.widht=1', 'did you mean config.model.width'),
        ('--config.steps=many', '--config.steps=many'),
        ('--config.steps=1.5', '--config.steps=1.5'),
        ('--config.flip=perhaps', '--config.flip=perhaps'),
        ('--config.match=3', '--config.match=3'),
        ('--steps=3', "Unknown command line flag 'steps'"),
        ('steps=3', "unexpected argument 'steps=3'"),
        ('--config.steps=0', 'config.steps=0: must be positive'),
        ('--config.steps=-5', 'config.steps=-5: must be positive'),
        ('--config.batch_size=20', 'config.batch_size=20: must be a multiple of 8, '),
        ('--config.accumulate_steps=3', 'number of devices times config.accumulate_steps=3'),
        ('--config.steps_per_dispatch=7', 'must be a multiple of config.steps_per_dispatch=7'),
        ('--config.precision=half', 'must be one of auto, float32, bfloat16'),
        ('--config.crop_min_area=2', 'config.crop_min_area=2.0: must be from 0 to 1'),
        ('--config.pretrain.batch_size=12', 'must be a multiple of 8, the number of devices'),
        ('--config.seed=-1', 'config.seed=-1: must be from 0'),
        ('--config.xmixup.alpha=0', 'config.xmixup.alpha=0.0: must be positive'),
        ('--config.xmixup.alpha=nan', 'config.xmixup.alpha=nan: must be positive'),
        ('--config.optimizer.momentum=1.5', 'config.optimizer.momentum=1.5: must be from 0 to 1'),
        ('--config.method=magic', "config.method='magic': must be one of finetune, l2sp, delta"),
        ('--config.match.similarity=l3', 'must be one of cosine, euclidean, emd'),
        ('--config.image_size=30', 'must not exceed config.resize=22'),
        (
            '--config.target.shots=0',
            "config.target.test_split='rest' needs config.target.shots > 0",
        ),
        ('--config.optimizer.warmup_steps=599', 'the learning rate would drop before'),
        ('--config.target.name=', 'config.target.name'),
    ],
)
def test_impossible_values_end_in_one_line(flag, words):
    with pytest.raises(ConfigError) as info:
        config, _ = parse(flag)
        validate(config, num_devices=8)
    assert words in str(info.value)
    assert '\n' not in str(info.value)


# The bounds of the methods' options, independent of those in the methods.
POSITIVE = {'alpha', 'temperature', 'distance', 'head_distance'}
FROM_ZERO = {'weight', 'beta', 'eta', 'target_weight', 'feature_weight', 'source_weight'}
FRACTIONS = {'prob', 'p', 'momentum'}
COUNTS = {'k', 'queue', 'dim', 'images', 'periods', 'every'}
COUNTS_FROM_ZERO = {'num_classes', 'steps', 'mix_at'}
# `alpha` is a weight in these methods, and a temperature of 0 means to fit it.
EXCEPTIONS = {'l2sp.alpha', 'dtnh.alpha', 'delta.alpha', 'cotuning.temperature'}
OPTIONS = [(name, key) for name, method in METHODS.items() for key in method.options]


def wrong_values(name, key):
    huge, never = (1e300, 2.0**32), (-1.0, math.nan, math.inf, -math.inf)
    if f'{name}.{key}' in EXCEPTIONS or key in FROM_ZERO:
        return (*huge, *never)
    if key in POSITIVE:
        return (0.0, *huge, *never)
    if key in FRACTIONS:
        return (1.0001, *huge, *never)
    if key in COUNTS:
        return (0, -1, 2**31)
    if key in COUNTS_FROM_ZERO:
        return (-1, 2**31)
    return () if type(METHODS[name].options[key].default) is bool else ('', 'nonsense')


@pytest.mark.parametrize(('name', 'key'), OPTIONS)
def test_impossible_options_of_any_method_end_in_one_line(name, key):
    config, _ = parse()
    good = config[name][key]
    for wrong in wrong_values(name, key):
        config[name][key] = wrong
        with pytest.raises(ConfigError) as info:
            validate(config, num_devices=8)
        assert str(info.value).startswith(f'config.{name}.{key}={wrong!r}: must be ')
        assert '\n' not in str(info.value)
    config[name][key] = good
    validate(config, num_devices=8)


def test_the_published_values_are_the_defaults():
    expected = {
        'l2sp': {'alpha': 0.01, 'beta': 0.01, 'all_parameters': False},
        'delta': {'alpha': 0.01, 'beta': 0.01, 'images': 128},
        'fsp': {'weight': 50.0},
        'bss': {'eta': 0.001, 'k': 1},
        'dtnh': {'alpha': 0.01, 'beta': 0.01, 'all_parameters': False},
        'seqtrain': {'num_classes': 0, 'steps': 0},
        'cotrain': {'target_weight': 0.5, 'weight': 0.5},
        'xmixup': {
            'alpha': 0.2,
            'lam': 'sample',
            'reflect': True,
            'label_space': 'joint',
            'source_head': 'random',
            'mix_at': 0,
        },
        'mixup': {'alpha': 0.2, 'lam': 'batch'},
        'cutmix': {'alpha': 1.0, 'prob': 0.5, 'lam': 'batch'},
        'lwf': {'weight': 1.0, 'temperature': 2.0},
        'stochnorm': {'p': 0.5},
        'cotuning': {'weight': 2.3, 'temperature': 0.0},
        'bituning': {
            'weight': 1.0,
            'queue': 40,
            'momentum': 0.999,
            'temperature': 0.07,
            'dim': 128,
        },
        'rifle': {'periods': 2, 'cyclic': False},
        'smile': {
            'alpha': 0.2,
            'feature_weight': 0.01,
            'source_weight': 0.1,
            'momentum': 0.999,
            'every': 10,
        },
        'mars': {'distance': 20.0, 'head_distance': 20.0},
        'mmd': {'weight': 0.1},
    }
    config, _ = parse()
    for name in METHODS:
        assert (config[name].to_dict() if name in config else {}) == expected.get(name, {})
        for key, value in expected.get(name, {}).items():
            assert type(config[name][key]) is type(value)


def test_a_warm_head_needs_pretrained_features():
    config, _ = parse('--config.warm_head=True')
    validate(config, num_devices=8)
    config.weights = ''
    with pytest.raises(ConfigError, match=r'config\.warm_head=True.*weights'):
        validate(config, num_devices=8)


def test_flag_and_value_may_be_two_arguments():
    config, workdir = parse_flags(['main', '--config', 'configs/digits.py', '--config.seed', '3'])
    assert (config.seed, workdir) == (3, Path('runs/digits-xmixup-seed3'))


@pytest.mark.parametrize('file', ['none.py', 'README.md'])
def test_unreadable_configuration_files(file):
    with pytest.raises(ConfigError, match=r'cannot read the configuration|no such file'):
        parse(file=file)


def test_pretraining_is_shared_by_runs_that_differ_in_nothing_it_depends_on():
    config = digits.get_config()
    same = digest(pretrain_config(config))
    for key, value in (('method', 'finetune'), ('seed', 3), ('steps', 7), ('cache_dir', 'x')):
        config[key] = value
    config.xmixup.alpha, config.target.shots, config.match.assignment = 0.2, 10, 'random'
    config.warm_head = True
    assert digest(pretrain_config(config)) == same
    config.pretrain.steps += 1
    assert digest(pretrain_config(config)) != same


def test_pretraining_trains_on_the_source():
    config = digits.get_config()
    derived = pretrain_config(config)
    assert (derived.method, derived.weights) == ('finetune', '')
    assert derived.target.to_dict() == config.source.to_dict()
    assert derived.optimizer.to_dict() == config.pretrain.optimizer.to_dict()
    assert derived.steps == config.pretrain.steps


def test_flatten_has_dotted_keys():
    assert flatten(digits.get_config())['pretrain.optimizer.learning_rate'] == 0.1


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['model.name=vit_s16', 'image_size=100'], 'at least 16 px, and a multiple of 16'),
        (['model.name=inception_v3', 'image_size=64'], 'at least 75 px'),
        (['model.name=efficientnet_lite0', 'model.stem=cifar'], 'only ResNets have these'),
        (['model.name=vit_b16', 'method=stochnorm'], 'but vit_b16 has no batch norm'),
        (['model.name=vit_b16', 'batch_norm=frozen'], 'but vit_b16 has no batch norm'),
        (
            ['model.name=dinov2_s14', 'image_size=224', 'resize=224', 'batch_norm=frozen'],
            'has no batch norm',
        ),
        (['model.name=dinov2_b14_reg4', 'image_size=100'], 'at least 14 px, and a multiple of 14'),
        (['model.name=clip_b32', 'image_size=48'], 'at least 32 px, and a multiple of 32'),
        (['model.name=convnext_tiny', 'batch_norm=frozen'], 'but convnext_tiny has no batch norm'),
        (['model.name=convnext_tiny', 'resize=31', 'image_size=31'], 'at least 32 px'),
        (['model.normalization=none'], 'must be one of '),
        (['target.test_share=1.5'], 'config.target.test_share=1.5: must be from 0 to 1'),
        (['max_bad_images=-1'], 'config.max_bad_images=-1: must be from 0 to'),
    ],
)
def test_limits_of_networks_and_data(flags, words):
    config, _ = parse(*(f'--config.{flag}' for flag in flags), file='configs/dtd.py')
    with pytest.raises(ConfigError) as info:
        validate(config, num_devices=8)
    assert words in str(info.value)
