"""Weights as safetensors files in torchvision's (and timm's) key layout, in and out.

`layer1.0.conv1.weight` [O, I, kH, kW] here is `layer1` / 0 / `conv1` / `kernel` [kH, kW, I, O];
`bn1.weight`, `.bias`, `.running_mean` and `.running_var` are scale, bias, mean and var.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xmixup_jax.errors import DataError
from xmixup_jax.files import whole_file
from xmixup_jax.optimizer import HEAD

PyTree = Any
WEIGHTS_FILE = 'model.safetensors'
_NAMES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}


def _key(path) -> str:
    *parents, leaf = [str(entry.key) for entry in path]
    return '.'.join([*parents, _NAMES.get(leaf, leaf)])


def _to_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)


def _from_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def save_weights(path: Path, params: PyTree, batch_stats: PyTree, metadata: dict[str, Any]) -> None:
    """Writes parameters and batch statistics; the file appears whole or not at all.

    `metadata`, JSON values, becomes one entry of the file's header: safetensors writes several in
    an order that changes, and equal runs should leave equal files.
    """
    tensors = {}
    for tree in (params, batch_stats):
        for key_path, array in jax.tree.leaves_with_path(tree):
            tensors[_key(key_path)] = _to_torch(np.asarray(array))
    with whole_file(path) as partial:
        save_file(tensors, partial, {'xmixup_jax': json.dumps(metadata)})


def load_backbone(path: Path, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """Fills a network with the weights in `path`, all but the head (`fc`), which stays as it is.

    Args:
      path: a safetensors file in torchvision's key layout.
      params, batch_stats: of the network; they give names and shapes, and the head.

    Raises:
      DataError: no such file, not a safetensors file, or its tensors are not this network's;
        lists every missing, unexpected and misshapen key.
    """
    tensors = _read(path, lambda key: not key.startswith(f'{HEAD}.'))
    ours = {
        _key(key_path): array.shape
        for tree in (params, batch_stats)
        for key_path, array in jax.tree.leaves_with_path(tree)
    }
    theirs = {
        key: _from_torch(tensor)
        for key, tensor in tensors.items()
        if not key.endswith('.num_batches_tracked')
    }
    ours = {key: shape for key, shape in ours.items() if not key.startswith(f'{HEAD}.')}
    faults = [f'missing {key}' for key in sorted(ours.keys() - theirs.keys())]
    faults += [f'unexpected {key}' for key in sorted(theirs.keys() - ours.keys())]
    faults += [
        f'{key} has shape {theirs[key].shape}, not {shape}'
        for key, shape in sorted(ours.items())
        if key in theirs and theirs[key].shape != shape
    ]
    if faults:
        raise DataError(
            f'weights file {path} does not fit config.model ({len(faults)} tensors differ): '
            + '; '.join(faults)
        )

    def fill(key_path, array):
        key = _key(key_path)
        return np.asarray(theirs[key], np.float32) if key in theirs else array

    return jax.tree.map_with_path(fill, params), jax.tree.map_with_path(fill, batch_stats)


def load_head(path: Path) -> dict[str, np.ndarray] | None:
    """The head in the weights file, float32 'kernel' [D, K] and 'bias' [K]; None if it has none."""
    tensors = _read(path, lambda key: key in (f'{HEAD}.weight', f'{HEAD}.bias'))
    if len(tensors) < 2:
        return None
    kernel, bias = (_from_torch(tensors[f'{HEAD}.{key}']) for key in ('weight', 'bias'))
    return {'kernel': np.asarray(kernel, np.float32), 'bias': np.asarray(bias, np.float32)}


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The tensors of the file whose key is wanted."""
    if not path.is_file():
        raise DataError(missing_weights(path))
    try:
        with safe_open(path, framework='numpy') as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise DataError(
            f'weights file {path} is not a readable safetensors file: {error}'
        ) from error


def missing_weights(path: Path) -> str:
    """What to do about a weights file that does not exist."""
    return (
        f'weights file {path} does not exist: save an ImageNet checkpoint in torchvision key '
        'layout there as safetensors (for resnet50, model.safetensors of timm/resnet50.tv_in1k on '
        'the Hugging Face Hub), or train the network on the source first with '
        '--config.weights=source'
    )
