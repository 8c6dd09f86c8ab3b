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

# The files of a run folder, other than its checkpoints and weights.
CONFIG = 'config.json'
DATA = 'data.json'
RESULT = 'result.json'
# Checksums of a finished run's files, for `sha256sum --check`; written last.
SUMS = 'SHA256SUMS'
METRICS = 'metrics.csv'
MATCH = 'match.json'
ENVIRONMENT = 'environment.json'
BEST = 'best_model.safetensors'
AVERAGE = 'ema_model.safetensors'
REPORT = 'report.html'
# Results of the test.
PER_CLASS = 'per_class.csv'
CONFUSION = 'confusion.csv'
PREDICTIONS = 'predictions.csv'

SAVE_SECONDS = 10.0  # between two saves of a `Resumable`


@contextlib.contextmanager
def file_lock(folder: Path, key: str, wait: bool) -> Iterator[None]:
    """Creates a folder and locks it against other processes.

    Args:
      folder: to lock.
      key: the flag that chooses another folder, for error messages.
      wait: whether to wait until another process releases the lock, or to fail.

    Raises:
      UserError: the folder is not writable, or is locked; names the host and pid of the owner.
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
    """Yields a temporary path, and replaces `path` by the file written there, once it is on disk.

    The file gets the permissions of the umask, whatever the writer set (safetensors: 0600).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique to this process, since others may write the same file of a shared cache.
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
    """Creates an empty file; returns its mode, with the permissions of the umask."""
    path.unlink(missing_ok=True)
    with path.open('xb') as file:
        return os.fstat(file.fileno()).st_mode


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot sync folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs a folder with everything in it, and its own entry in the parent folder."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    sync(folder.parent)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an .npz file atomically; its zip format has a checksum for each array."""
    with atomic_write(path) as partial, partial.open('wb') as file:
        named: dict[str, Any] = arrays  # otherwise mypy takes them for allow_pickle
        np.savez(file, **named)


def load_arrays(path: Path, *keys: str) -> list[np.ndarray] | None:
    """Reads arrays that `save_arrays` wrote; None if the file is missing or corrupted."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            return [saved[key] for key in keys]
    except FileNotFoundError:
        return None
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        log.warning('%s is corrupted (%s) and will be recomputed', path, error)
        return None


class Resumable:
    """An .npz file of arrays that take long to compute, with partial results in a second file."""

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_suffix('.part.npz')
        self._saved = time.monotonic()

    def load(self, *keys: str) -> list[np.ndarray] | None:
        """Reads the partial results that `save` wrote; None if there are none."""
        return load_arrays(self._unfinished, *keys)

    @property
    def due(self) -> bool:
        """Whether the last `save` was more than SAVE_SECONDS ago."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, **arrays: np.ndarray) -> None:
        """Writes partial results."""
        save_arrays(self._unfinished, **arrays)
        self._saved = time.monotonic()

    def finish(self, **arrays: np.ndarray) -> None:
        """Writes the final file, and removes the partial results."""
        save_arrays(self._path, **arrays)
        self._unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is corrupted.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f'{path} is corrupted ({error}): restore it from a copy, or remove it'
        ) from error


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a corrupted file or folder of a run to WORKDIR/damaged/; returns the new path."""
    aside = workdir / 'damaged' / f'{path.relative_to(workdir)}-{time.time_ns()}'
    aside.parent.mkdir(parents=True, exist_ok=True)
    path.rename(aside)
    return aside
