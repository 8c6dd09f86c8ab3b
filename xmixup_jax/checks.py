"""Checks the values of a configuration, each by itself and in combination."""

import math
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax.config import ADDED, flatten, is_probe
from xmixup_jax.data.balance import SAMPLINGS, WEIGHTS
from xmixup_jax.data.cache import CACHES
from xmixup_jax.data.decode import FITS
from xmixup_jax.devices import DEVICE_GROUPS, PRECISIONS
from xmixup_jax.errors import ConfigError
from xmixup_jax.matching import ASSIGNMENTS, SIMILARITIES
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Method
from xmixup_jax.methods.find import method_name, method_of
from xmixup_jax.models import MODELS, NORMALIZATIONS
from xmixup_jax.models.base import HEAD_INITS
from xmixup_jax.models.normalization import BATCH_NORMS
from xmixup_jax.models.resnet import STEMS
from xmixup_jax.optimizer import DECAYED, OPTIMIZERS

_CHOICES: dict[str, Collection[str]] = {
    'fit': FITS,
    'augment.policy': ('', 'randaugment', 'trivialaugment'),
    'model.name': MODELS,
    'model.stem': STEMS,
    'model.normalization': ('', *NORMALIZATIONS),
    'batch_norm': BATCH_NORMS,
    'batch_norm_over': DEVICE_GROUPS,
    'head_init': HEAD_INITS,
    'match.similarity': SIMILARITIES,
    'match.assignment': ASSIGNMENTS,
    'data.cache': CACHES,
    'balance.sampling': SAMPLINGS,
    'balance.weights': WEIGHTS,
    'precision': PRECISIONS,
    **dict.fromkeys(('optimizer.schedule', 'pretrain.optimizer.schedule'), ('step', 'cosine')),
    **dict.fromkeys(('optimizer.name', 'pretrain.optimizer.name'), OPTIMIZERS),
    **dict.fromkeys(('optimizer.decayed', 'pretrain.optimizer.decayed'), DECAYED),
}
# (keys, test of a value, description of the allowed values).
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
        'max_bad_images patience checkpoint_seconds',
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
    (
        'optimizer.b2 pretrain.optimizer.b2 label_smoothing ema_decay balance.beta '
        'source.validation_share target.validation_share',
        lambda value: 0 <= value < 1,
        'from 0 to below 1',
    ),
)


def _methods_in(config: ConfigDict) -> dict[str, Method]:
    """The methods whose options are in the configuration."""
    methods = METHODS | {method_name(config.method): method_of(config)}
    return {name: method for name, method in methods.items() if name in config}


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split('.'):
        config = config[part]
    return config


def validate(config: ConfigDict, num_devices: int) -> None:
    """Checks a configuration.

    Args:
      config: a complete configuration.
      num_devices: number of devices of all processes, across which a batch is split.

    Raises:
      ConfigError: a value is impossible; names the key and the allowed values.
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
                f'config.{key}={_get(config, key)}: must be a multiple of {divisor}, the number of '
                'devices'
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
            'config.warm_head=True starts the head as a classifier of pre-trained features, but '
            "config.weights='' is a random network: give weights, or config.weights=source"
        )
    predicted = method_of(config).pairs and config.match.similarity == 'predicted'
    if predicted and not config.weights:
        raise ConfigError(
            "config.match.similarity=predicted needs a pre-trained head, but config.weights='' is "
            'a random network: give weights, or use --config.match.similarity=cosine'
        )
    if config.batch_norm != 'batch' and not config.weights:
        raise ConfigError(
            f'config.batch_norm={config.batch_norm} normalises by pre-trained statistics, but '
            "config.weights='' is a random network: give weights, or config.batch_norm=batch"
        )
    if config.batch_norm == 'mixed' and not config.reestimate:
        raise ConfigError(
            'config.batch_norm=mixed needs config.reestimate > 0, since its statistics for the '
            'test are estimated after training'
        )
    _validate_model(config)
    _validate_freeze(config)
    _validate_balance(config)
    for key in ('source', 'target'):
        part = config[key]
        if part.shots and part.sample_rate != 1:
            raise ConfigError(
                f'config.{key}.shots={part.shots} and config.{key}.sample_rate={part.sample_rate}: '
                'give only one of them (shots=0 and sample_rate=1 mean all images)'
            )
        if not part.sample_rate:
            raise ConfigError(f'config.{key}.sample_rate=0: must be more than 0')
        if part.test_split == 'rest' and not part.shots and part.sample_rate == 1:
            raise ConfigError(
                f"config.{key}.test_split='rest' needs config.{key}.shots > 0 or a sample_rate "
                'below 1: if all images are used for training, none are left for the test'
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
                f'optimizer.warmup_steps={part.warmup_steps}: the learning rate would drop before '
                f'the warm-up ends, at step {part.drop_at} x {steps}'
            )
    if not config.target.name:
        raise ConfigError(
            'config.target.name is empty: name the target data, for example folder:PATH'
        )
    if config.eval_every and not (config.target.test_split or config.target.validation_share):
        raise ConfigError(
            f'config.eval_every={config.eval_every}: there are no images to test on; give '
            '--config.target.test_split or --config.target.validation_share, or set it to 0'
        )


def _validate_freeze(config: ConfigDict) -> None:
    freeze = config.freeze
    if not freeze:
        return
    if freeze != 'backbone' and not (freeze.isdecimal() and int(freeze) > 0):
        raise ConfigError(
            f"config.freeze={freeze!r}: must be '' (nothing), backbone, or the number of stages to "
            'freeze, counted from the first'
        )
    if not config.weights:
        raise ConfigError(
            f"config.freeze={freeze} keeps pre-trained weights, but config.weights='' is a random "
            'network: give weights, or config.weights=source'
        )
    if freeze == 'backbone' and method_of(config).needs_backbone:
        raise ConfigError(
            f'config.method={config.method} changes the backbone, but config.freeze=backbone '
            'freezes it: freeze only some stages (config.freeze=2), or use another method'
        )
    if is_probe(config):
        unused = [
            f'config.{key}={value}'
            for key, value in flatten(config).items()
            if key.startswith(('label_smoothing', 'ema_decay', 'balance.', 'patience', 'augment.'))
            and value != ADDED[key]
        ]
        if unused:
            raise ConfigError(
                f'{unused[0]} has no effect in a linear probe (config.method=finetune with '
                'config.freeze=backbone): leave it out, or freeze only some stages'
            )


def _validate_balance(config: ConfigDict) -> None:
    if config.balance.sampling != 'natural' and config.balance.weights != 'none':
        raise ConfigError(
            f'config.balance.sampling={config.balance.sampling} and '
            f'config.balance.weights={config.balance.weights} would correct the imbalance twice: '
            'use one of them'
        )
    if config.patience and not (config.target.validation_share and config.eval_every):
        raise ConfigError(
            f'config.patience={config.patience} counts validations, so it needs '
            '--config.target.validation_share (for example 0.2) and --config.eval_every'
        )


def _validate_model(config: ConfigDict) -> None:
    model, known, norm = config.model, MODELS[config.model.name], method_of(config).norm
    if config.image_size < known.min_size or config.image_size % known.multiple:
        raise ConfigError(
            f'config.image_size={config.image_size}: {model.name} needs images of at least '
            f'{known.min_size} px'
            + (f', and a multiple of {known.multiple}' if known.multiple > 1 else '')
        )
    if not known.scalable and (model.width, model.stem) != (64, 'imagenet'):
        raise ConfigError(
            f'config.model.width={model.width}, config.model.stem={model.stem!r}: only ResNets '
            f'have these options; {model.name} needs the defaults (64, imagenet)'
        )
    if not known.has_batch_norm and (norm or config.batch_norm != 'batch'):
        raise ConfigError(
            f'config.method={config.method} with config.batch_norm={config.batch_norm} changes '
            f'batch norm, but {model.name} has no batch norm: choose another method or network, '
            'and config.batch_norm=batch'
        )
    if norm and config.batch_norm != 'batch':
        raise ConfigError(
            f'config.method={config.method} has its own batch norm: use --config.batch_norm=batch'
        )
