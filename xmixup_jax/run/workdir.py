"""The run folder: lock it, check its configuration, verify its files."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xmixup_jax import config as config_lib
from xmixup_jax.compute.step import make_task
from xmixup_jax.devices import chosen_precision
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
from xmixup_jax.weights.files import is_intact
from xmixup_jax.weights.find import WEIGHTS_FILE

log = logging.getLogger('xmixup_jax')

_FILES = (
    CONFIG, DATA, ENVIRONMENT, MATCH, METRICS, RESULT, PER_CLASS, CONFUSION, PREDICTIONS,
    WEIGHTS_FILE, BEST, AVERAGE, REPORT,
)  # fmt: skip


@contextlib.contextmanager
def locked(folder: Path, key: str = '--workdir', wait: bool = False) -> Iterator[None]:
    """Creates the folder and locks it for this run; see `files.file_lock`.

    Args:
      folder: the folder of the run.
      key: the flag that chooses another folder, for errors.
      wait: whether to wait until another run releases the lock, or to fail at once.
    """
    with contextlib.ExitStack() as stack:
        # The first process locks it on behalf of all processes.
        first_process(stack.enter_context)(file_lock(folder, key, wait))
        yield


def has_result(workdir: Path) -> bool:
    """Whether the run in the folder is finished, even if its files are corrupted."""
    return broadcast((workdir / RESULT).exists())


def claim(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Stores the configuration, or compares it with the one that the run was started with.

    Args:
      config: configuration of the run; config.precision=auto is replaced by what the run has, or
        by what suits the devices.
      workdir: folder of the run.
      checkpoints: checkpoints of the run.

    Returns:
      the result, if the run in the folder is finished and its files are intact; otherwise None. A
      corrupted result, weights file or report is moved aside, to be made again from the last
      checkpoint.

    Raises:
      ConfigError: the configuration differs, and either config.allow_changes is not set, or the
        change does not fit what the run has saved.
    """
    damaged = damaged_files(workdir)
    stored = None if CONFIG in damaged else _stored_config(workdir)
    if stored is None:  # in all processes alike
        if (workdir / CONFIG).exists():
            damaged.append(CONFIG)
        meta = checkpoints.restore_meta()
        stored = meta and meta.config
    if not (checkpoints.steps or has_result(workdir)):
        stored = None  # the run was refused or killed before it saved anything
    if config.precision == 'auto':
        config.precision = stored['precision'] if stored else chosen_precision('auto')
        if config.precision != 'float32':
            log.info('Precision: %s (automatic choice)', config.precision)
    changes = {} if stored is None else config_lib.changes(ConfigDict(stored), config)
    if changes:
        _check_changes(config, workdir, changes, max(checkpoints.steps, default=0))
        meta = checkpoints.restore_meta()
        if meta is not None:
            checkpoints.check_structure(make_task(config, meta.sizes).shapes)
    whole = all((workdir / name).exists() for name in (RESULT, SUMS))
    # These can be made again only from a checkpoint.
    of_test = (PER_CLASS, CONFUSION, PREDICTIONS, REPORT, SUMS)
    from_checkpoint = (*of_test, AVERAGE, CONFIG, METRICS, MATCH, ENVIRONMENT)
    remade = {RESULT, WEIGHTS_FILE, *(from_checkpoint if checkpoints.steps else ())}
    whole &= not changes and not remade & set(damaged)
    whole = broadcast(whole)
    _update(config, workdir, changes, damaged, whole)
    return every_process(read_json)(workdir / RESULT) if whole else None


@every_process
def _stored_config(workdir: Path) -> dict[str, Any] | None:
    """Reads config.json; None if it is missing or corrupted, as the checkpoints have a copy."""
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
    fixed = [key for key in changes if config_lib.is_fixed(key)]
    if not config.allow_changes:
        anyway = ', or resume it anyway with --config.allow_changes=True'
        raise ConfigError(
            f'{workdir / CONFIG} belongs to a run with another configuration ({shown}): choose '
            f'another --workdir{"" if fixed else anyway}'
        )
    if fixed:
        raise ConfigError(
            f'config.{fixed[0]} cannot change in {workdir}: the files that the run has saved '
            f'depend on it ({shown}); choose another --workdir'
        )
    if config.steps < done:
        raise ConfigError(
            f'config.steps={config.steps}: {workdir} has already done {done}; use at least as many'
        )
    log.warning('%s resumes with changes: %s', workdir, shown)


@first_process
def _update(
    config: ConfigDict, workdir: Path, changes: dict[str, Any], damaged: list[str], whole: bool
) -> None:
    """Writes the configuration, and moves corrupted files and those of an earlier one aside."""
    for name in dict.fromkeys(damaged):
        path = workdir / name
        aside = f'moved to {set_aside(path, workdir)}' if path.exists() else 'it is missing'
        log.warning('%s is not as the run wrote it: %s', path, aside)
    if changes:
        count = len(list(workdir.glob('config-*.json')))
        for path in (workdir / name for name in (CONFIG, RESULT, SUMS)):
            if path.exists():
                path.rename(path.with_name(f'{path.stem}-{count}{path.suffix}'))
    if not whole:
        write_json(workdir / CONFIG, config.to_dict())


@every_process
def damaged_files(workdir: Path) -> list[str]:
    """Lists the files of a finished run that are missing or have changed; [] for other runs.

    If the list of digests itself is corrupted, it is listed too. The best network, which is in no
    checkpoint, is then kept if it is intact by its own digest.
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
    if BEST in damaged and is_intact(workdir / BEST):
        damaged[damaged.index(BEST)] = SUMS
    elif content != _sums(sums):
        damaged.append(SUMS)
    return damaged


def _sums(sums: dict[str, str]) -> bytes:
    """Formats digests as `sha256sum --check` reads them."""
    return ''.join(f'{digest}  {name}\n' for name, digest in sums.items()).encode()


@first_process
def seal(workdir: Path) -> None:
    """Writes the digests of a finished run's files."""
    sums = {name: sha256(workdir / name) for name in _FILES if (workdir / name).is_file()}
    with atomic_write(workdir / SUMS) as partial:
        partial.write_bytes(_sums(sums))
