"""Atomic writes and file locks."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xmixup_jax.errors import UserError

log = logging.getLogger('xmixup_jax')

# The files of a run folder, beside its checkpoints and weights.
CONFIG = 'config.json'
DATA = 'data.json'
RESULT = 'result.json'
# Digests of a finished run's files, as `sha256sum --check` reads them; written last.
SUMS = 'SHA256SUMS'
METRICS = 'metrics.csv'
MATCH = 'match.json'
ENVIRONMENT = 'environment.json'
BEST = 'best_model.safetensors'
AVERAGE = 'ema_model.safetensors'
REPORT = 'report.html'
# Figures of the test.
PER_CLASS = 'per_class.csv'
CONFUSION = 'confusion.csv'
PREDICTIONS = 'predictions.csv'

SAVE_SECONDS = 10.0  # between two saves of a `Resumable`


@contextlib.contextmanager
def file_lock(folder: Path, key: str, wait: bool) -> Iterator[None]:
    """Makes the folder and locks it against other processes.

    Args:
      folder: to lock.
      key: the flag that chooses another folder, for errors.
      wait: until another process releases the lock, or fail.

    Raises:
      UserError: the folder is not writable, or locked; names the host and process of the owner.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / '.lock').open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write into {folder}: {error.strerror}; choose another folder with {key}'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = f'another run ({file.read().strip() or "just started"})'
            if not wait:
                raise UserError(
                    f'{holder} is writing into {folder}: wait for it, or choose another {key}'
                ) from error
            log.info('%s is writing into %s: waiting for it', holder, folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f'host {socket.gethostname()}, pid {os.getpid()}\n')
        file.flush()
        yield


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `path`, once it is on disk.

    Its permissions are those of the umask, whatever the writer gave it (safetensors: 0600).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: others may be writing the same file of a shared cache.
    partial = path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.tmp')
    try:
        permissions = _new_file(partial)
        yield partial
        if partial.stat().st_mode != permissions:
            partial.chmod(stat.S_IMODE(permissions))
        sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def _new_file(path: Path) -> int:
    """Makes an empty file; returns the permissions that the umask gives it."""
    path.unlink(missing_ok=True)
    with path.open('xb') as file:
        return os.fstat(file.fileno()).st_mode


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot do it for folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for all that is in the folder, itself and its name."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    sync(folder.parent)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a .npz file, which has a checksum of each array."""
    with atomic_write(path) as partial, partial.open('wb') as file:
        named: dict[str, Any] = arrays  # else mypy takes them for allow_pickle
        np.savez(file, **named)


def load_arrays(path: Path, *keys: str) -> list[np.ndarray] | None:
    """What `save_arrays` wrote, to be made anew where it is None: absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            return [saved[key] for key in keys]
    except FileNotFoundError:
        return None
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        log.warning('%s is damaged (%s): made anew', path, error)
        return None


class Resumable:
    """A .npz file of arrays that take long to find, and what an interrupted search has found."""

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_suffix('.part.npz')
        self._saved = time.monotonic()

    def load(self, *keys: str) -> list[np.ndarray] | None:
        """What `save` wrote last; None if nothing, or if it is damaged."""
        return load_arrays(self._unfinished, *keys)

    @property
    def due(self) -> bool:
        """Whether the last `save` is SAVE_SECONDS ago."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, **arrays: np.ndarray) -> None:
        """Writes what has been found so far."""
        save_arrays(self._unfinished, **arrays)
        self._saved = time.monotonic()

    def finish(self, **arrays: np.ndarray) -> None:
        """Writes the file itself."""
        save_arrays(self._path, **arrays)
        self._unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
      UserError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f'{path} is damaged ({error}): restore it from a copy, or remove it'
        ) from error


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a damaged file or folder of a run to WORKDIR/damaged/; the new path."""
    aside = workdir / 'damaged' / f'{path.relative_to(workdir)}-{time.time_ns()}'
    aside.parent.mkdir(parents=True, exist_ok=True)
    path.rename(aside)
    return aside
