"""Reads and writes weights files, with the keys of timm (for ResNets also torchvision's).

A file's `layer1.0.conv1.weight` [O, I, kH, kW] is `layer1` / 0 / `conv1` / `kernel` [kH, kW, I, O]
in a network's params; `bn1.weight`, `.bias`, `.running_mean` and `.running_var` are `scale`,
`bias`, `mean` and `var`. The head has timm's name in files, and is always `fc` in params.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xmixup_jax.errors import DataError, UserError, first_line
from xmixup_jax.files import atomic_write, read_json
from xmixup_jax.integrity import arrays_digest, json_array, network_digest
from xmixup_jax.models import MODELS
from xmixup_jax.optimizer import HEAD
from xmixup_jax.trees import read_tree
from xmixup_jax.weights.kinds import kind_of
from xmixup_jax.weights.npz_file import NpzFileError, read_npz_file
from xmixup_jax.weights.torch_file import FoundSet, TorchFileError, read_torch_file

PyTree = Any
_HEADER = 'xmixup_jax'  # name of our entry in a file's header
_NAMES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}


def tensor_key(model: str, path) -> str:
    """The key in timm's layout of the parameter or statistic at a path in the tree.

    Args:
      model: config.model.name.
      path: as from `jax.tree.leaves_with_path`.
    """
    *parents, leaf = [str(entry.key) for entry in path]
    if parents and parents[0] == HEAD:
        parents[0] = MODELS[model].head
    return '.'.join([*parents, _NAMES.get(leaf, leaf)])


def _to_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)


def from_torch(array: np.ndarray) -> np.ndarray:
    """Converts kernels from PyTorch's axes [O, I, ...] to Flax's [..., I, O]."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def torch_tensors(model: str, params: PyTree, batch_stats: PyTree) -> dict[str, np.ndarray]:
    """Converts all parameters and statistics to timm's keys and PyTorch's axes.

    Args:
      model: config.model.name.
      params, batch_stats: of the network.
    """
    tensors = {}
    for tree in (params, batch_stats):
        for path, array in jax.tree.leaves_with_path(tree):
            tensors[tensor_key(model, path)] = _to_torch(np.asarray(array))
    return tensors


def save_weights(
    path: Path, model: str, params: PyTree, batch_stats: PyTree, metadata: dict[str, Any]
) -> None:
    """Writes a safetensors file atomically, with a digest of its content.

    `metadata` (JSON values) becomes a single entry of the header. safetensors writes several
    entries in random order, and equal runs should leave equal files.

    Raises:
      UserError: the file cannot be written.
    """
    tensors = torch_tensors(model, params, batch_stats)
    header = {'content': metadata, 'digest': _digest(tensors, metadata)}
    with atomic_write(path) as partial:
        try:
            save_file(tensors, partial, {_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise UserError(f'{path} cannot be written ({error}): make room') from error


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
    return arrays_digest({**tensors, _HEADER: json_array(metadata)})


def read_tensors(path: Path, model: str, entry: str = '') -> FoundSet:
    """Reads all tensors of a weights file, in a format detected from its content.

    Args:
      path: of a file, or of the folder of an orbax checkpoint.
      model: config.model.name.
      entry: chooses among several sets in a PyTorch file, see `sets.choose_set`.

    Returns:
      the tensors, by the keys of the file.

    Raises:
      DataError: the file cannot be read; says why and what to do.
    """
    kind = kind_of(path)
    if kind == 'orbax':
        return FoundSet(_read_orbax(path, model), entry)
    try:
        if kind == 'torch':
            return read_torch_file(path, entry)
        if kind == 'npz':
            return FoundSet(read_npz_file(path), entry)
        return FoundSet(_read_safetensors(path), entry)
    except (TorchFileError, NpzFileError, OSError) as error:
        raise DataError(f'weights {path} cannot be read: {error}') from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework='numpy') as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = _read_header(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f'weights file {path} is a corrupted or incomplete safetensors file '
            f'({first_line(error)}): download or copy it again'
        ) from error
    except (TypeError, AttributeError) as error:  # NumPy has no such dtype
        raise DataError(
            f'weights file {path} contains numbers of an unsupported type ({first_line(error)}): '
            'save float32 tensors'
        ) from error
    if header and header['digest'] != _digest(tensors, header['content']):
        raise DataError(
            f'weights file {path} is corrupted, its checksum differs: restore it from a copy'
        )
    return tensors


def _read_header(file: safe_open) -> dict[str, Any]:
    """The header entry of `save_weights`; {} in files of other programs."""
    header = json.loads((file.metadata() or {}).get(_HEADER, '{}'))
    if header and not (isinstance(header, dict) and {'content', 'digest'} <= header.keys()):
        raise ValueError(f'its header {_HEADER} is corrupted')
    return header


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the `metadata` that `save_weights` wrote; {} for files of other programs.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with safe_open(path, framework='numpy') as file:
            return _read_header(file).get('content', {})
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f'{path} is not a readable safetensors file: {error}') from error


def is_intact(path: Path) -> bool:
    """Whether a file exists and is intact, as `save_weights` wrote it."""
    try:
        return path.is_file() and bool(read_metadata(path)) and bool(read_tensors(path, '').tensors)
    except DataError:
        return False


def _read_orbax(path: Path, model: str) -> dict[str, np.ndarray]:
    """Reads 'params' and 'batch_stats' of an orbax checkpoint, and ignores the rest."""
    try:
        tree = read_tree(path)
    except Exception as error:  # orbax's errors on corrupted files have no common class
        raise DataError(
            f'weights {path} cannot be read as an orbax checkpoint: {first_line(error)}'
        ) from error
    if not {'params', 'batch_stats'} <= tree.keys():
        raise DataError(
            f"weights {path} have no 'params' and 'batch_stats', so they are not a checkpoint of "
            'xmixup-jax'
        )
    meta = path.with_name('meta') / 'metadata'  # of a run's checkpoint, see `Checkpoints`
    if meta.is_file():
        found = network_digest(tree['params'], tree['batch_stats'])
        if read_json(meta).get('network') != found:
            raise DataError(
                f'weights {path} are corrupted, their checksum differs: restore them from a copy'
            )
    return torch_tensors(model, tree['params'], tree['batch_stats'])
