"""The run folder: lock it, check its configuration, verify its files."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.errors import ConfigError, UserError, first_line
from xmixup_jax.files import (
    AVERAGE,
    BEST,
    CONFIG,
    CONFUSION,
    DATA,
    ENVIRONMENT,
    MATCH,
    METRICS,
    PER_CLASS,
    PREDICTIONS,
    REPORT,
    RESULT,
    SUMS,
    atomic_write,
    file_lock,
    read_json,
    set_aside,
    write_json,
)
from xmixup_jax.integrity import sha256
from xmixup_jax.processes import broadcast, every_process, first_process
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.weights.files import is_whole
from xmixup_jax.weights.find import WEIGHTS_FILE

log = logging.getLogger('xmixup_jax')

_FILES = (
    CONFIG, DATA, ENVIRONMENT, MATCH, METRICS, RESULT, PER_CLASS, CONFUSION, PREDICTIONS,
    WEIGHTS_FILE, BEST, AVERAGE, REPORT,
)  # fmt: skip


@contextlib.contextmanager
def locked(folder: Path, key: str = '--workdir', wait: bool = False) -> Iterator[None]:
    """Makes the folder and locks it for this run; see `files.file_lock`."""
    with contextlib.ExitStack() as stack:
        # By the first process, for all of them.
        first_process(stack.enter_context)(file_lock(folder, key, wait))
        yield


def has_result(workdir: Path) -> bool:
    """Whether the run in the folder has come to its end, whole or damaged."""
    return broadcast((workdir / RESULT).exists())


def claim(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Stores the configuration, or compares it with the one that the run was begun with.

    Returns:
      the result, if the run in the folder is finished and whole. If its result, weights or report
      are damaged they are moved aside, to be made again from the last checkpoint.

    Raises:
      ConfigError: it is another configuration, and config.allow_changes is not set, or the change
        is one that what the run has saved cannot follow.
    """
    damaged = damaged_files(workdir)
    stored = None if CONFIG in damaged else _stored_config(workdir)
    if stored is None:  # all processes have found it so
        if (workdir / CONFIG).exists():
            damaged.append(CONFIG)
        meta = checkpoints.restore_meta()
        stored = meta and meta.config
    if not (checkpoints.steps or has_result(workdir)):
        stored = None  # it was refused, or killed, before anything was saved
    changes = {} if stored is None else config_lib.changes(ConfigDict(stored), config)
    if changes:
        _check_changes(config, workdir, changes, max(checkpoints.steps, default=0))
    whole = all((workdir / name).exists() for name in (RESULT, SUMS))
    # Without checkpoints nothing would be left to make them from.
    of_test = (PER_CLASS, CONFUSION, PREDICTIONS, REPORT, SUMS)
    remade = {RESULT, WEIGHTS_FILE, *((*of_test, AVERAGE) if checkpoints.steps else ())}
    whole &= not changes and not remade & set(damaged)
    whole = broadcast(whole)
    _update(config, workdir, changes, damaged, whole)
    return every_process(read_json)(workdir / RESULT) if whole else None


@every_process
def _stored_config(workdir: Path) -> dict[str, Any] | None:
    """None if there is none, or a damaged one: the checkpoints have it too."""
    try:
        return read_json(workdir / CONFIG)
    except FileNotFoundError:
        return None
    except UserError as error:
        log.warning('%s', first_line(error))
        return None


def _check_changes(
    config: ConfigDict, workdir: Path, changes: dict[str, tuple[Any, Any]], done: int
) -> None:
    shown = ', '.join(f'config.{key}: {old!r} -> {new!r}' for key, (old, new) in changes.items())
    if not config.allow_changes:
        raise ConfigError(
            f'{workdir / CONFIG} is of a run with another configuration ({shown}): choose another '
            '--workdir, or continue it all the same with --config.allow_changes=True'
        )
    fixed = [key for key in changes if config_lib.is_fixed(key)]
    if fixed:
        raise ConfigError(
            f'config.{fixed[0]} cannot change in {workdir}: what the run has saved depends on it '
            f'({shown}); choose another --workdir'
        )
    if config.steps < done:
        raise ConfigError(f'config.steps={config.steps}: {workdir} has done {done} already')
    log.warning('%s continues with changes: %s', workdir, shown)


@first_process
def _update(
    config: ConfigDict, workdir: Path, changes: dict[str, Any], damaged: list[str], whole: bool
) -> None:
    """Writes the configuration; what is of an earlier one, or damaged, goes aside."""
    for name in dict.fromkeys(damaged):
        path = workdir / name
        aside = f'moved to {set_aside(path, workdir)}' if path.exists() else 'it is missing'
        log.warning('%s is not what the run wrote: %s', path, aside)
    if changes:
        count = len(list(workdir.glob('config-*.json')))
        for path in (workdir / name for name in (CONFIG, RESULT, SUMS)):
            if path.exists():
                path.rename(path.with_name(f'{path.stem}-{count}{path.suffix}'))
    if not whole:
        write_json(workdir / CONFIG, config.to_dict())


@every_process
def damaged_files(workdir: Path) -> list[str]:
    """Those of a finished run that are missing or no longer what they were; [] of any other.

    The list of digests may be what is damaged. Then it is named, and the best network, which no
    checkpoint has, stays if it is whole by its own digest.
    """
    path = workdir / SUMS
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content.decode(errors='replace').splitlines()
    sums = dict(line.split('  ', 1)[::-1] for line in lines if '  ' in line)
    damaged = [
        name
        for name in _FILES
        if (workdir / name).is_file() != (name in sums)
        or (name in sums and sha256(workdir / name) != sums[name])
    ]
    if BEST in damaged and is_whole(workdir / BEST):
        damaged[damaged.index(BEST)] = SUMS
    elif content != _sums(sums):
        damaged.append(SUMS)
    return damaged


def _sums(sums: dict[str, str]) -> bytes:
    """As `sha256sum --check` reads it."""
    return ''.join(f'{digest}  {name}\n' for name, digest in sums.items()).encode()


@first_process
def seal(workdir: Path) -> None:
    """Writes the digests of the run's files, now that it is finished."""
    sums = {name: sha256(workdir / name) for name in _FILES if (workdir / name).is_file()}
    with atomic_write(workdir / SUMS) as partial:
        partial.write_bytes(_sums(sums))
