"""Files that appear whole or not at all."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xmixup_jax.errors import UserError


@contextlib.contextmanager
def held(folder: Path, key: str, wait: bool) -> Iterator[None]:
    """Makes the folder and holds it, so that no other process does the same.

    Args:
      folder: to hold.
      key: what a user can change it with.
      wait: for another process that holds it, or fail.

    Raises:
      UserError: it cannot be written, or is held.
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
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f'another run is writing into {folder}: wait for it, or choose another {key}'
            ) from error
        yield


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what is there in the end, on disk, takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.tmp')
    yield partial
    with partial.open('rb') as file:
        os.fsync(file.fileno())
    partial.replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    with whole_file(path) as partial, partial.open('wb') as file:
        np.save(file, array)


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + '\n')
