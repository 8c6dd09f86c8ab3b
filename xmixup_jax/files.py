"""Files that appear whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


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
