"""Reads and writes trees of arrays in orbax's format."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

# A small corrupted folder may claim huge arrays, which orbax would allocate before reading.
_MAX_GROWTH = 100
_ALWAYS_ALLOWED = 2**26


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes a tree of arrays, replacing what was at the path."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), jax.tree.map(np.asarray, tree), force=True)


def read_tree(path: Path) -> PyTree:
    """Reads a tree that `write_tree` wrote, as nested dicts.

    Raises:
      ValueError: it claims to be far larger than its files.
      Exception: it is corrupted; orbax's errors have no common class.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        described = jax.tree.leaves(checkpointer.metadata(path.absolute()).item_metadata.tree)
        claimed = sum(
            int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in described
        )
        if claimed > _MAX_GROWTH * _size(path) + _ALWAYS_ALLOWED:
            raise ValueError(f'it claims to contain {claimed:,} bytes of arrays')
        return int_keys(checkpointer.restore(path.absolute()))


def _size(folder: Path) -> int:
    return sum(
        Path(parent, name).stat().st_size for parent, _, names in os.walk(folder) for name in names
    )


def int_keys(tree: PyTree) -> PyTree:
    """Converts numeric keys to int: without a template, orbax returns list positions as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: int_keys(value) for key, value in tree.items()}
