"""Trees of arrays on disk, in orbax's format."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

# A small folder may say that it holds huge arrays, which would be made before they are read.
_MAX_GROWTH = 100
_ALWAYS_ALLOWED = 2**26


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes arrays, in place of what was there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), jax.tree.map(np.asarray, tree), force=True)


def read_tree(path: Path) -> PyTree:
    """What `write_tree` wrote, as nested dicts.

    Raises:
      ValueError: it says that it is far larger than its files.
      Exception: it is damaged; orbax has no common class for what that raises.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        described = jax.tree.leaves(checkpointer.metadata(path.absolute()).item_metadata.tree)
        claimed = sum(
            int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in described
        )
        if claimed > _MAX_GROWTH * _size(path) + _ALWAYS_ALLOWED:
            raise ValueError(f'it says that it holds {claimed:,} bytes of arrays')
        return int_keys(checkpointer.restore(path.absolute()))


def _size(folder: Path) -> int:
    return sum(
        Path(parent, name).stat().st_size for parent, _, names in os.walk(folder) for name in names
    )


def int_keys(tree: PyTree) -> PyTree:
    """Without a template, orbax returns the places in a list of layers (0, 1, ...) as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: int_keys(value) for key, value in tree.items()}
