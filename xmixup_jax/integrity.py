"""Digests, to verify everything a run has written before it is used.

A digest is the SHA-256 of some content. A seal is a digest stored next to the content.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of arrays, whatever their order."""
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f'{key} {array.shape} {array.dtype}'.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def json_array(value: Any) -> np.ndarray:
    """Encodes a JSON value as a uint8 array for `arrays_digest`; equal values, equal arrays."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def by_name(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, such as 'params/fc/kernel'."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def tree_digest(tree: PyTree) -> str:
    """`arrays_digest` of the leaves of a tree."""
    return arrays_digest(by_name(jax.device_get(tree)))


def network_digest(params: PyTree, batch_stats: PyTree) -> str:
    """`tree_digest` of a network. Checkpoints store it for readers that only need the network."""
    return tree_digest({'params': params, 'batch_stats': batch_stats})
