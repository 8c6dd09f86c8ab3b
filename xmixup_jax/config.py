"""Checks and compares configurations, and chooses their method; `defaults` has their schema."""

import copy
import hashlib
import json
import math
from collections.abc import Collection, Iterable
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import defaults
from xmixup_jax.data.cache import CACHES
from xmixup_jax.data.decode import FITS
from xmixup_jax.errors import ConfigError
from xmixup_jax.matching import ASSIGNMENTS, SIMILARITIES
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Method
from xmixup_jax.methods.find import Found, find_method, method_name, method_of
from xmixup_jax.models import MODELS, NORMALIZATIONS
from xmixup_jax.models.base import BATCH_NORMS, HEAD_INITS
from xmixup_jax.models.resnet import STEMS
from xmixup_jax.optimizer import DECAYED, OPTIMIZERS

# These may differ between a run and its continuation: they do not change what is computed.
_RUNTIME_KEYS = (
    'data_dir',
    'cache_dir',
    'num_threads',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'keep_checkpoints',
    'remat',
    'steps_per_dispatch',
    'data',
    'max_bad_images',
    'allow_changes',
    'report',
    'wandb',
)
# What a run has saved depends on these: it cannot go on with others.
_FIXED_KEYS = (
    'method',
    'seed',
    'source',
    'target',
    'model',
    'weights',
    'warm_head',
    'head_init',
    'pretrain',
    'match',
    'batch_size',
)

_CHOICES: dict[str, Collection[str]] = {
    'fit': FITS,
    'augment.policy': ('', 'randaugment', 'trivialaugment'),
    'model.name': MODELS,
    'model.stem': STEMS,
    'model.normalization': ('', *NORMALIZATIONS),
    'batch_norm': BATCH_NORMS,
    'head_init': HEAD_INITS,
    'match.similarity': SIMILARITIES,
    'match.assignment': ASSIGNMENTS,
    'data.cache': CACHES,
    'precision': ('float32', 'bfloat16'),
    **dict.fromkeys(('optimizer.schedule', 'pretrain.optimizer.schedule'), ('step', 'cosine')),
    **dict.fromkeys(('optimizer.name', 'pretrain.optimizer.name'), OPTIMIZERS),
    **dict.fromkeys(('optimizer.decayed', 'pretrain.optimizer.decayed'), DECAYED),
}
# Each bound: the keys, a test of the value, and the words for what is allowed.
_BOUNDS = (
    (
        'steps accumulate_steps steps_per_dispatch batch_size eval_batch_size resize image_size '
        'log_every checkpoint_every keep_checkpoints model.width match.classes_per_target '
        'pretrain.steps pretrain.batch_size optimizer.learning_rate augment.num_ops '
        'pretrain.optimizer.learning_rate',
        lambda value: 0 < value < math.inf,
        'positive',
    ),
    (
        'num_threads seed pretrain.seed reestimate source.shots target.shots '
        'match.images_per_class eval_every optimizer.warmup_steps '
        'pretrain.optimizer.warmup_steps optimizer.weight_decay '
        'pretrain.optimizer.weight_decay optimizer.head_multiplier '
        'pretrain.optimizer.head_multiplier optimizer.clip_norm pretrain.optimizer.clip_norm '
        'max_bad_images',
        lambda value: 0 <= value < 2**32,
        'from 0 to 2**32 - 1',
    ),
    (
        'crop_min_area augment.color_jitter augment.erasing '
        'optimizer.momentum pretrain.optimizer.momentum optimizer.drop_at '
        'optimizer.layer_decay pretrain.optimizer.layer_decay '
        'pretrain.optimizer.drop_at optimizer.drop_factor pretrain.optimizer.drop_factor '
        'source.sample_rate target.sample_rate source.test_share target.test_share',
        lambda value: 0 <= value <= 1,
        'from 0 to 1',
    ),
    ('augment.magnitude', lambda value: 0 <= value <= 30, 'from 0 to 30'),
    ('test_views', lambda value: value in (1, 2, 10), '1, 2 or 10'),
    ('optimizer.b2 pretrain.optimizer.b2', lambda value: 0 <= value < 1, 'from 0 to below 1'),
)


def add_methods(config: ConfigDict, methods: Iterable[str]) -> None:
    """Adds the options of methods that are not built in, so that they can be set.

    Args:
      config: with the sections of `defaults` and no others.
      methods: names and paths, as for config.method.

    Raises:
      ConfigError: a method cannot be loaded, or its name is taken.
    """
    for found in {each.value: each for each in map(find_method, methods)}.values():
        if found.value not in METHODS:
            _add_section(config, found)


def choose_method(config: ConfigDict, method: str) -> None:
    """Sets config.method, adds the method's options, and drops those of others not built in.

    Args:
      config: to change; values of the method's options that it has already stay.
      method: a built-in method, one of an installed package, or the path of a file.

    Raises:
      ConfigError: the method cannot be loaded, or its name is taken.
    """
    found, known = find_method(method), defaults.get_config()
    with config.unlocked():
        for key in [key for key in config if key not in known and key != found.name]:
            del config[key]
        if found.value not in METHODS and (found.name in known or found.name not in config):
            _add_section(config, found)
        config.method = found.value
        if found.digest:
            config.method_digest = found.digest


def _add_section(config: ConfigDict, found: Found) -> None:
    if found.name in config:
        raise ConfigError(
            f'config.method={found.value}: another method or value has the name '
            f'config.{found.name}: rename the method'
        )
    with config.unlocked():
        config[found.name] = ConfigDict(found.method.defaults)


def _methods_in(config: ConfigDict) -> dict[str, Method]:
    """Every method whose options the configuration holds."""
    methods = METHODS | {method_name(config.method): method_of(config)}
    return {name: method for name, method in methods.items() if name in config}


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split('.'):
        config = config[part]
    return config


def validate(config: ConfigDict, num_devices: int) -> None:
    """Raises ConfigError with the key and what is allowed, if any value is impossible.

    Args:
      config: a complete configuration.
      num_devices: over which a batch is divided, all processes counted.
    """
    for key, allowed in _CHOICES.items():
        if _get(config, key) not in allowed:
            raise ConfigError(
                f'config.{key}={_get(config, key)!r}: must be one of {", ".join(allowed)}'
            )
    for keys, holds, words in _BOUNDS:
        for key in keys.split():
            if not holds(_get(config, key)):  # NaN fails every comparison
                raise ConfigError(f'config.{key}={_get(config, key)}: must be {words}')
    for name, method in _methods_in(config).items():
        for key, option in method.options.items():
            value = config[name][key]
            if not option.holds(value):
                raise ConfigError(f'config.{name}.{key}={value!r}: must be {option.allowed}')
    parts = config.accumulate_steps
    for key in ('batch_size', 'eval_batch_size', 'pretrain.batch_size'):
        divisor = num_devices * (1 if key == 'eval_batch_size' else parts)
        if _get(config, key) % divisor:
            raise ConfigError(
                f'config.{key}={_get(config, key)}: must be a multiple of the {num_devices} devices'
                + (f' times config.accumulate_steps={parts}' if divisor > num_devices else '')
            )
    for key in ('log_every', 'eval_every', 'checkpoint_every'):
        if _get(config, key) % config.steps_per_dispatch:
            raise ConfigError(
                f'config.{key}={_get(config, key)}: must be a multiple of '
                f'config.steps_per_dispatch={config.steps_per_dispatch}'
            )
    if config.image_size > config.resize:
        raise ConfigError(
            f'config.image_size={config.image_size}: must not exceed config.resize={config.resize}'
        )
    if config.warm_head and not config.weights:
        raise ConfigError(
            'config.warm_head=True: the head begins as a classifier of pre-trained features, but '
            "config.weights='' has none: give weights, or config.weights=source"
        )
    predicted = method_of(config).pairs and config.match.similarity == 'predicted'
    if predicted and not config.weights:
        raise ConfigError(
            "config.match.similarity=predicted needs a pre-trained head, but config.weights='' has "
            'none: give weights, or use --config.match.similarity=cosine'
        )
    if config.batch_norm != 'batch' and not config.weights:
        raise ConfigError(
            f'config.batch_norm={config.batch_norm} normalises by pre-trained statistics, but '
            "config.weights='' has none: give weights, or config.batch_norm=batch"
        )
    if config.batch_norm == 'mixed' and not config.reestimate:
        raise ConfigError(
            'config.batch_norm=mixed needs config.reestimate > 0: its statistics for the test are '
            'estimated after training'
        )
    _validate_model(config)
    for key in ('source', 'target'):
        part = config[key]
        if part.shots and part.sample_rate != 1:
            raise ConfigError(
                f'config.{key}.shots={part.shots} and config.{key}.sample_rate={part.sample_rate}: '
                'give one of them (shots=0 or sample_rate=1 is none)'
            )
        if not part.sample_rate:
            raise ConfigError(f'config.{key}.sample_rate=0: must be more than 0')
        if part.test_split == 'rest' and not part.shots and part.sample_rate == 1:
            raise ConfigError(
                f"config.{key}.test_split='rest' needs config.{key}.shots > 0 or a sample_rate "
                'below 1: with all images in training none are left for the test'
            )
    for part, steps in (
        (config.optimizer, config.steps),
        (config.pretrain.optimizer, config.pretrain.steps),
    ):
        if part.name != 'sgd' and part.momentum == 1:
            raise ConfigError(f'optimizer.momentum=1: {part.name} needs a value below 1')
        if part.schedule == 'cosine' and part.warmup_steps >= steps:
            raise ConfigError(
                f'optimizer.warmup_steps={part.warmup_steps}: must be less than {steps} steps'
            )
        if part.schedule == 'step' and part.warmup_steps > part.drop_at * steps:
            raise ConfigError(
                f'optimizer.warmup_steps={part.warmup_steps}: the rate drops before, at step '
                f'{part.drop_at} x {steps}'
            )
    if not config.target.name or not config.target.test_split:
        raise ConfigError(
            'config.target.name and config.target.test_split must name the data to train for'
        )


def _validate_model(config: ConfigDict) -> None:
    model, known, norm = config.model, MODELS[config.model.name], method_of(config).norm
    if config.image_size < known.min_size or config.image_size % known.multiple:
        raise ConfigError(
            f'config.image_size={config.image_size}: {model.name} takes images of at least '
            f'{known.min_size} px'
            + (f', a multiple of {known.multiple}' if known.multiple > 1 else '')
        )
    if not known.scalable and (model.width, model.stem) != (64, 'imagenet'):
        raise ConfigError(
            f'config.model.width={model.width}, config.model.stem={model.stem!r}: only ResNets '
            f'have these options; {model.name} needs the defaults (64, imagenet)'
        )
    if not known.has_batch_norm and (norm or config.batch_norm != 'batch'):
        raise ConfigError(
            f'config.method={config.method} with config.batch_norm={config.batch_norm} changes '
            f'batch norm, but {model.name} has none: choose another method or network, and '
            'config.batch_norm=batch'
        )
    if norm and config.batch_norm != 'batch':
        raise ConfigError(
            f'config.method={config.method} has a batch norm of its own: use '
            '--config.batch_norm=batch'
        )


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The run that trains `config`'s network on its source, from random weights.

    It depends on nothing but the source, the network and `config.pretrain`, so that all
    experiments that agree in these share it.
    """
    derived = copy.deepcopy(config)
    derived.unlock()
    choose_method(derived, 'finetune')
    for key in ('seed', 'steps', 'batch_size', 'optimizer'):
        derived[key] = copy.deepcopy(config.pretrain[key])
    derived.weights = ''
    derived.batch_norm, derived.head_init = 'batch', 'uniform'
    derived.augment, derived.test_views = defaults.get_config().augment, 1
    derived.target = copy.deepcopy(config.source)
    for key in ('pretrain', 'match', 'warm_head', 'reestimate', *METHODS):
        if key in derived:
            del derived[key]
    derived.eval_every = 0
    derived.wandb = ''
    return derived.lock()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Every value by its dotted key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f'{key}.{sub}': v for sub, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested form of what `flatten` returns."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split('.')
        place = nested
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def experiment_values(config: ConfigDict) -> dict[str, Any]:
    """The flat configuration without the keys that do not change what is computed.

    Those are the runtime's and the options of the methods that are not used. A method in a file
    goes by its name; config.method_digest tells its content.
    """
    chosen = method_name(config.method)
    unused = (*_RUNTIME_KEYS, *(method for method in METHODS if method != chosen))
    values = {key: v for key, v in flatten(config).items() if key.split('.')[0] not in unused}
    return values | {'method': chosen}


def changes(stored: ConfigDict, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Key to (stored, given) of all values that change what is computed and are not the same.

    Not the names of data sets: a run knows its data by their content, wherever they are.
    """
    theirs, ours = (json.loads(json.dumps(experiment_values(each))) for each in (stored, config))
    keys = sorted((theirs.keys() | ours.keys()) - {'target.name', 'source.name'})
    return {k: (theirs.get(k), ours.get(k)) for k in keys if theirs.get(k) != ours.get(k)}


def is_fixed(key: str) -> bool:
    """Whether a run cannot go on with another value, config.allow_changes or not."""
    return key.split('.')[0] in _FIXED_KEYS


def digest(config: ConfigDict) -> str:
    """12 hexadecimal digits that tell experiments apart."""
    text = json.dumps(experiment_values(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
