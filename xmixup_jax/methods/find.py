"""Finds the method that `config.method` names.

That is the name of a built-in method, the name of an entry point in the group `xmixup_jax.methods`
of an installed package, or the path of a Python file, ending in `.py`, that defines METHOD. A file
is identified by its content: the configuration holds its digest. Once loaded, the code stays the
method of its run, whatever happens to the file.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import keyword
import sys
import traceback
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.errors import ConfigError, first_line
from xmixup_jax.methods import METHODS
from xmixup_jax.methods.base import Method
from xmixup_jax.methods.options import Option

GROUP = 'xmixup_jax.methods'
_SUFFIX = '.py'
_TRACED = 'traced values'  # among the constants: no name that a method would give
_TRACED_KEYS = ('optimizer.weight_decay', 'optimizer.head_multiplier')  # of every method


class Found(NamedTuple):
    """A method and its entries in a configuration."""

    method: Method
    value: str
    """For config.method: a name, or the absolute path of a file."""
    name: str
    """The name of the section with its options and of the folders of its runs."""
    digest: str = ''
    """The file's digest, for config.method_digest; '' without a file."""


def method_name(value: str) -> str:
    """The name of the method that config.method stands for; a file's is its stem.

    >>> method_name('xmixup'), method_name('/home/me/mine.py')
    ('xmixup', 'mine')
    """
    return Path(value).stem if value.endswith(_SUFFIX) else value


def find_method(value: str) -> Found:
    """Looks up a method by its name or file.

    Raises:
      ConfigError: there is none, it cannot be loaded, or its name is that of a built-in one.
    """
    name = method_name(value)
    if value == name:
        if value in METHODS and not _entry_points(value):
            return Found(METHODS[value], value, value)
        return Found(_load_installed(value), value, value)
    path = Path(value)
    with contextlib.suppress(RuntimeError):  # the home of an unknown user
        path = path.expanduser()
    path = path.absolute()
    if name in METHODS:
        raise ConfigError(f'config.method={value}: {name} is a built-in method: rename the file')
    digest = _digest(_read(path))
    return Found(_load_file(str(path), digest), str(path), name, digest)


def method_of(config: ConfigDict) -> Method:
    """The method of a configuration that `config.choose_method` or a command line has made.

    Raises:
      ConfigError: there is no such method, or its file has changed.
    """
    value = config.method
    if value in METHODS:
        return METHODS[value]
    if not value.endswith(_SUFFIX):
        return _load_installed(value)
    if 'method_digest' not in config:
        raise ConfigError(
            f'config.method={value}: use xmixup_jax.config.choose_method(config, {value!r}), '
            'which adds its options'
        )
    return _load_file(value, config.method_digest)


def options_of(config: ConfigDict) -> ConfigDict:
    """The values of the chosen method's options; empty if it has none."""
    return config.get(method_name(config.method), ConfigDict())


def traced_keys(config: ConfigDict) -> tuple[str, ...]:
    """The keys of the values that a compiled step takes as arrays, as in 'optimizer.weight_decay'.

    Runs that differ only in these share their compiled steps.
    """
    name, options = method_name(config.method), method_of(config).options
    return (*_TRACED_KEYS, *(f'{name}.{key}' for key, option in options.items() if option.traced))


def with_traced(constants: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """Adds the values of `traced_keys`, as arrays, to a method's constants."""
    paths = [key.split('.') for key in traced_keys(config)]
    values = {f'{part}.{key}': np.float32(config[part][key]) for part, key in paths}
    return constants | {_TRACED: values}


def traced_shapes(config: ConfigDict) -> dict[str, Any]:
    """Constants with only the shapes of the values of `traced_keys`."""
    return {_TRACED: dict.fromkeys(traced_keys(config), jax.ShapeDtypeStruct((), np.float32))}


def config_with(config: ConfigDict, constants: dict[str, Any]) -> ConfigDict:
    """The configuration with the arrays that `with_traced` added to the constants."""
    values = config.to_dict()
    for key, array in constants[_TRACED].items():
        part, name = key.split('.')
        values.setdefault(part, {})[name] = array
    return ConfigDict(values)


def _entry_points(name: str) -> list[importlib.metadata.EntryPoint]:
    return [e for e in importlib.metadata.entry_points(group=GROUP) if e.name == name]


@functools.lru_cache
def _load_installed(name: str) -> Method:
    found = _entry_points(name)
    if not found:
        raise ConfigError(
            f'config.method={name!r}: must be one of {", ".join(METHODS)}, the name of an entry '
            f'point {GROUP} of an installed package, or the path of a file ending in {_SUFFIX}'
        )
    packages = ', '.join(sorted({e.dist.name if e.dist else e.value for e in found}))
    where = f'config.method={name}: the entry point in {packages}'
    if name in METHODS:
        raise ConfigError(f'{where} has the name of a built-in method: uninstall or rename it')
    if len(found) > 1:
        raise ConfigError(f'{where} is not the only one of this name: uninstall all but one')
    try:
        method = found[0].load()
    except (Exception, SystemExit) as error:  # whatever the package's code raises
        raise ConfigError(
            f'{where} cannot be loaded ({_described(error)}): repair or reinstall the package'
        ) from error
    return _checked(method, name, where)


@functools.lru_cache
def _load_file(path: str, digest: str) -> Method:
    """Runs a file. It is not imported, since Python's compiled copy of it may be older."""
    content = _read(Path(path))
    if _digest(content) != digest:
        raise ConfigError(f'config.method={path}: the file has changed: run the command again')
    module = types.ModuleType(f'xmixup_jax_method_{method_name(path)}')
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(content, path, 'exec'), module.__dict__)  # noqa: S102
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        at = f', line {lines[-1]}' if lines else ''
        raise ConfigError(
            f'config.method={path}: the file raises an error ({_described(error)}{at}): repair it'
        ) from error
    if not hasattr(module, 'METHOD'):
        raise ConfigError(
            f'config.method={path}: the file defines no METHOD: add METHOD = Method(...) with the '
            'Method of xmixup_jax.methods.base'
        )
    return _checked(module.METHOD, method_name(path), f'config.method={path}: METHOD')


def _checked(method: Any, name: str, where: str) -> Method:
    """Raises ConfigError if the object is no method, or its names cannot be those of values."""
    if not isinstance(method, Method):
        raise ConfigError(
            f'{where} is of type {type(method).__name__}: it must be a Method(...) of '
            'xmixup_jax.methods.base'
        )
    for key in (name, *method.options):
        if not _is_key(key):
            raise ConfigError(
                f'{where}: {key!r} cannot be a part of config.METHOD.KEY: give it another name, of '
                'letters, digits and _'
            )
    for key, option in method.options.items():
        if not isinstance(option, Option):
            raise ConfigError(
                f'{where}: the option {key!r} is of type {type(option).__name__}: it must come '
                'from xmixup_jax.methods.options, for example positive(0.1, "weight of ...")'
            )
    return method


def _is_key(name: str) -> bool:
    """Whether ConfigDict accepts the name as an attribute, and has no method of that name."""
    usable = isinstance(name, str) and name.isidentifier() and not name.startswith('_')
    return usable and not keyword.iskeyword(name) and not hasattr(ConfigDict, name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise ConfigError(
            f'config.method={str(path)!r} cannot be read ({reason}): give the path of a Python '
            'file that defines METHOD'
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _described(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'
