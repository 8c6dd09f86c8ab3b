"""Chooses the method of a configuration, and compares configurations; see `defaults` for keys."""

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import defaults
from xmixup_jax.devices import chosen_precision
from xmixup_jax.errors import ConfigError, DataError
from xmixup_jax.files import CONFIG, read_json
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.find import Found, find_method, method_name
from xmixup_jax.text import one_line

# These may change when a run resumes, since they do not change its results.
_RUNTIME_KEYS = (
    'data_dir',
    'cache_dir',
    'num_threads',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'checkpoint_seconds',
    'keep_checkpoints',
    'remat',
    'steps_per_dispatch',
    'data',
    'max_bad_images',
    'allow_changes',
    'report',
    'wandb',
)
# Keys that earlier versions did not have, with the values that reproduce those versions. `digest`
# leaves these values out, so that networks pre-trained by earlier versions are still found.
ADDED = {
    'freeze': '',
    'batch_norm_over': 'all',
    'label_smoothing': 0.0,
    'ema_decay': 0.0,
    'balance.sampling': 'natural',
    'balance.weights': 'none',
    'balance.beta': 0.999,
    'patience': 0,
    'fit': 'crop',
    'test_views': 1,
    'augment.policy': '',
    'augment.num_ops': 2,
    'augment.magnitude': 9,
    'augment.color_jitter': 0.0,
    'augment.erasing': 0.0,
    'source.validation_share': 0.0,
    'target.validation_share': 0.0,
}
# A run's saved state depends on these, so it cannot resume with other values.
_FIXED_KEYS = (
    'method',
    'seed',
    'source',
    'target',
    'model',
    'weights',
    'warm_head',
    'head_init',
    'freeze',
    'ema_decay',
    'balance',
    'pretrain',
    'match',
    'batch_size',
)


def add_methods(config: ConfigDict, methods: Iterable[str]) -> None:
    """Adds the options of methods that are not built in, so that flags can set them.

    Args:
      config: to change; has only the sections of `defaults`.
      methods: names and paths, as for config.method.

    Raises:
      ConfigError: a method cannot be loaded, or its name is taken.
    """
    for found in {each.value: each for each in map(find_method, methods)}.values():
        if found.value not in METHODS:
            _add_section(config, found)


def choose_method(config: ConfigDict, method: str) -> None:
    """Sets config.method, adds its options, and drops those of other methods not built in.

    Args:
      config: to change; options of the method that it has already keep their values.
      method: a built-in method, a method of an installed package, or the path of a file.

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
            f'config.method={found.value}: the name config.{found.name} is taken by another method '
            'or key; rename the method'
        )
    with config.unlocked():
        config[found.name] = ConfigDict(found.method.defaults)


def is_probe(config: ConfigDict) -> bool:
    """Whether the run is a linear probe: it fits a classifier to features, without any steps."""
    return config.freeze == 'backbone' and config.method == 'finetune'


def total_steps(config: ConfigDict) -> int:
    """The number of training steps of a run without early stopping."""
    return 0 if is_probe(config) else config.steps


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the run that trains the network on the source, from random weights.

    It depends on the source, the network, `config.pretrain` and how images are prepared and batches
    split (`image_size`, `flip`, `accumulate_steps`, ...); experiments that agree in these share it.
    """
    derived = copy.deepcopy(config)
    derived.unlock()
    choose_method(derived, 'finetune')
    for key in ('seed', 'steps', 'batch_size', 'optimizer'):
        derived[key] = copy.deepcopy(config.pretrain[key])
    derived.weights = ''
    derived.batch_norm, derived.head_init = 'batch', 'uniform'
    derived.precision = chosen_precision(config.precision)
    own = ('source.', 'target.', 'fit')  # of the data
    derived.update_from_flattened_dict({k: v for k, v in ADDED.items() if not k.startswith(own)})
    derived.target = copy.deepcopy(config.source)
    for key in ('pretrain', 'match', 'warm_head', 'reestimate', *METHODS):
        if key in derived:
            del derived[key]
    derived.eval_every = 0
    derived.wandb = ''
    return derived.lock()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns every value by its dotted key, such as 'optimizer.name'."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f'{key}.{sub}': v for sub, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`; returns nested dicts."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split('.')
        place = nested
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def experiment_values(config: ConfigDict) -> dict[str, Any]:
    """The flat configuration without keys that do not change the results.

    These are the runtime keys and the options of unused methods. For a method in a file,
    'method' is its name, and 'method_digest' identifies its content.
    """
    chosen = method_name(config.method)
    unused = {*_RUNTIME_KEYS, *(method for method in METHODS if method != chosen)}
    if config.target.get('validation_share'):  # the validations choose the best network
        unused.remove('eval_every')
    values = {key: v for key, v in flatten(config).items() if key.split('.')[0] not in unused}
    return values | {'method': chosen}


def changes(stored: ConfigDict, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Compares two configurations: key -> (stored, given) for values that change the results.

    The names of data sets are not compared, since a run identifies its data by content.
    """
    theirs, ours = (json.loads(json.dumps(experiment_values(each))) for each in (stored, config))
    theirs = ADDED | theirs
    keys = sorted((theirs.keys() | ours.keys()) - {'target.name', 'source.name'})
    return {k: (theirs.get(k), ours.get(k)) for k in keys if theirs.get(k) != ours.get(k)}


def is_pretraining(config: ConfigDict) -> bool:
    """Whether it is the configuration of a pre-training, see `pretrain_config`."""
    return 'pretrain' not in config


def own_run(workdir: Path) -> ConfigDict:
    """The configuration of the run in a folder.

    Raises:
      DataError: it is the pre-training of other runs, or cannot be read.
    """
    config = from_stored(read_json(workdir / CONFIG))
    if is_pretraining(config):
        raise DataError(
            f'{one_line(workdir)} is the pre-training of other runs (config.weights=source): run '
            'the command of one of them, which continues it'
        )
    return config


def from_stored(values: dict[str, Any]) -> ConfigDict:
    """Makes a configuration from a run's config.json, adding keys that earlier versions lack."""
    stored = ConfigDict(values)
    return ConfigDict(unflatten(ADDED | flatten(stored)))


def is_fixed(key: str) -> bool:
    """Whether a run cannot resume with another value, even with config.allow_changes."""
    return key.split('.')[0] in _FIXED_KEYS


def digest(config: ConfigDict) -> str:
    """12 hexadecimal digits that identify an experiment."""
    values = experiment_values(config)
    values = {key: value for key, value in values.items() if ADDED.get(key, ...) != value}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
