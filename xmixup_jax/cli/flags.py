"""The flags that all experiments share: --config, --config.KEY and --workdir."""

import difflib
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from xmixup_jax import defaults
from xmixup_jax.checks import validate
from xmixup_jax.cli.program import setup
from xmixup_jax.config import add_methods, choose_method, flatten
from xmixup_jax.errors import ConfigError
from xmixup_jax.methods.find import method_name
from xmixup_jax.processes import connect
from xmixup_jax.text import one_line, valid_text

_PACKAGE = Path(__file__).parents[1]
# Inside the installed package, or beside the package in a checkout.
EXPERIMENTS = next(
    path for path in (_PACKAGE / 'configs', _PACKAGE.parent / 'configs') if path.is_dir()
)


def read_command(argv: list[str]) -> tuple[ConfigDict, Path]:
    """Parses a command line, connects to the run's other processes, and sets up this one.

    Returns:
      (config, workdir): the validated configuration and the folder of the run.

    Raises:
      ConfigError: the flags or the configuration are invalid.
    """
    config, workdir = parse_flags(connect(argv))
    validate(config, jax.device_count())
    setup(config.cache_dir)
    return config, workdir


def parse_flags(argv: list[str], methods: Sequence[str] = ()) -> tuple[ConfigDict, Path]:
    """Parses `--config=NAME`, `--config.KEY=VALUE` and `--workdir=DIR`.

    Args:
      argv: the program's name and its arguments.
      methods: further methods whose options may be set, besides the built-in ones and the chosen
        one.

    Returns:
      (config, workdir); by default, workdir is runs/EXPERIMENT-METHOD-seedN.

    Raises:
      ConfigError: an unknown flag or key, a value of the wrong type, or an unreadable file.
    """
    name, argv = _pop_flag('config', argv)
    if name is None:
        raise ConfigError('--config is missing: name an experiment, for example --config=digits')
    path = find_experiment(name)
    chosen, _ = _pop_flag('config.method', argv)
    config = load_experiment(path, [*methods, *([] if chosen is None else [chosen])])
    _check_keys(argv, config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, 'folder of the run', flag_values=values)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f'{error}: use --config, --config.KEY and --workdir') from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_wrong_value(str(error), argv, config)) from error
    if len(rest) > 1:
        raise ConfigError(f'unexpected argument {rest[1]!r}: set values with --config.KEY=VALUE')
    config = values.config
    choose_method(config, config.method)
    default = Path('runs') / f'{path.stem}-{method_name(config.method)}-seed{config.seed}'
    return config, _checked_workdir(Path(values.workdir) if values.workdir else default)


def _checked_workdir(workdir: Path) -> Path:
    """Raises ConfigError if the path is not valid UTF-8, as Orbax cannot write there."""
    whole = str(workdir.absolute())
    if valid_text(whole) != whole:
        raise ConfigError(
            f'--workdir={one_line(whole)} is not valid UTF-8, so checkpoints cannot be written '
            'there: choose a folder with another name'
        )
    return workdir


def _pop_flag(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Removes a flag from a command line; returns its last value (or None) and the rest."""
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        flag, given, text = argument.partition('=')
        if flag in (f'--{name}', f'-{name}'):
            value = text if given else next(arguments, value)
        else:
            rest.append(argument)
    return value, rest


def find_experiment(name: str) -> Path:
    """Returns the file of an experiment.

    Args:
      name: path of a file, or name of an experiment installed with the package.

    Raises:
      ConfigError: there is no such file; lists the installed experiments.
    """
    for path in (Path(name).expanduser(), EXPERIMENTS / f'{name}.py'):
        if path.is_file():
            return path
    known = sorted(path.stem for path in EXPERIMENTS.glob('[a-z]*.py'))
    raise ConfigError(
        f'--config={name}: there is no such file, and no installed experiment of this name '
        f'({", ".join(known)})'
    )


def load_experiment(path: Path, methods: Sequence[str] = ()) -> ConfigDict:
    """Reads the configuration from a file. Keys that its `get_config` omits get their defaults.

    Args:
      path: the Python file.
      methods: further methods whose options it gets, besides the built-in ones and its own.

    Raises:
      ConfigError: the file cannot be read, has no `get_config`, or has an unknown key; a method
        cannot be loaded.
    """
    try:
        given = ConfigDict(runpy.run_path(str(path))['get_config']())
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f'cannot read the configuration {path}: {type(error).__name__}: '
            f'{" ".join(str(error).split())}'
        ) from error
    config = defaults.get_config()
    add_methods(config, [str(given.get('method', config.method)), *methods])
    known = flatten(config)
    for key, value in flatten(given).items():
        if key not in known:
            raise ConfigError(f'{path}: there is no key {key!r}{_similar(key, known)}')
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{path}: {key}={value!r}: {error}') from error
    return config


def _check_keys(argv: list[str], config: ConfigDict) -> None:
    """Raises ConfigError if a flag `--config.KEY` does not name a value."""
    known = flatten(config)
    for argument in argv[1:]:
        prefix, _, rest = argument.partition('.')
        if prefix.lstrip('-') in ('config', 'noconfig') and prefix.startswith('-'):
            key = rest.split('=')[0]
            if key not in known:
                section = any(each.startswith(f'{key}.') for each in known)
                words = (
                    f'names a group of values, for example --config.{_first_key(key, known)}'
                    if section
                    else f'there is no such key{_similar(key, known)}'
                )
                raise ConfigError(f'{argument}: {words}')


def _wrong_value(message: str, argv: list[str], config: ConfigDict) -> str:
    """Says which flag has a value of the wrong type, and which type it should have.

    Args:
      message: absl's message, which starts with the flag if it is about one.
      argv: the command line.
      config: the configuration before the flags are applied.
    """
    found = re.match(r'flag --config\.([\w.]+)', message)
    values = flatten(config)
    if found is None or found[1] not in values:
        return ' '.join(message.split())
    given, _ = _pop_flag(f'config.{found[1]}', argv)
    value = values[found[1]]
    kinds = {bool: 'True or False', int: 'a whole number', float: 'a number'}
    kind = kinds.get(type(value), 'of the same type')
    return one_line(f'--config.{found[1]}={given}: must be {kind}; the experiment has {value!r}')


def _first_key(section: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(f'{section}.'))


def _similar(key: str, known: dict[str, Any]) -> str:
    """Suggests the keys most similar to `key`, or failing that, those with a similar last part."""
    last = key.rsplit('.', 1)[-1]
    ends = {full.rsplit('.', 1)[-1]: full for full in reversed(list(known))}
    close = difflib.get_close_matches(key, known) or [
        ends[end] for end in difflib.get_close_matches(last, ends)
    ]
    if not close:
        return f'; {Path(defaults.__file__).name} explains all keys'
    return f'; did you mean {" or ".join(f"config.{each}" for each in close)}?'
