"""Reads tensors from PyTorch's `.pth` files, without PyTorch and without running code from them.

Both formats are supported: the zip archive of PyTorch 1.6 and later, and the sequence of pickles of
earlier versions. `torch_pickle` evaluates the pickles; it never builds any other objects.
"""

import contextlib
import errno
import io
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xmixup_jax.errors import first_line
from xmixup_jax.weights.sets import choose_set
from xmixup_jax.weights.torch_pickle import (
    Foreign,
    Interpreter,
    Storage,
    Tensor,
    TorchFileError,
    persistent_storage,
)

__all__ = ['FoundSet', 'TorchFileError', 'read_torch_file']

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Tensors may share data, so a small malicious file could describe huge arrays.
_MAX_GROWTH = 16
# Keys with these endings are always tensors of a network.
_LEAVES = ('weight', 'bias', 'running_mean', 'running_var', 'cls_token', 'pos_embed')


class FoundSet(NamedTuple):
    """A set of tensors found in a file."""

    tensors: dict[str, np.ndarray]
    """By the keys of the file."""
    part: str
    """The part of the requested entry after the set's name; perhaps a prefix of keys."""
    name: str = ''
    """Name of the set, if the file has several."""


def read_torch_file(path: Path, entry: str = '') -> FoundSet:
    """Reads the tensors of a state dict, an entry of a checkpoint, or a pickled network.

    Args:
      path: of the file.
      entry: chooses among several sets, see `choose_set`.

    Returns:
      the set, with float16 and bfloat16 converted to float32.

    Raises:
      TorchFileError: the file is corrupted or contains no tensors; says what to do.
      OSError: the file cannot be read.
    """
    try:
        with _opened(path) as value:
            chosen, part, name = choose_set(value, entry, path)
            _check_leaves(chosen)
            tensors = {
                str(key): tensor.array()
                for key, tensor in chosen.items()
                if isinstance(tensor, Tensor)
            }
    except TorchFileError:
        raise
    except Exception as error:  # a corrupted pickle can raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a bad offset
            raise
        raise TorchFileError(
            f'it is corrupted or incomplete ({type(error).__name__}: {first_line(error)}): '
            'download or copy it again'
        ) from error
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_GROWTH * path.stat().st_size:
        raise TorchFileError('its tensors would take far more memory than the file has bytes')
    half = (np.float16, ml_dtypes.bfloat16)
    tensors = {
        key: tensor.astype(np.float32) if tensor.dtype in half else tensor
        for key, tensor in tensors.items()
    }
    return FoundSet(tensors, part, name)


def _check_leaves(chosen: dict[str, Any]) -> None:
    """Raises TorchFileError if an entry that should be a tensor is another object."""
    for key, value in chosen.items():
        leaf = str(key).split('.')[-1]
        if isinstance(value, Foreign) and leaf in _LEAVES:
            raise TorchFileError(
                f'its entry {key[:80]!r} is a {value.name[:80]}, which is not a plain tensor: save '
                'float32 tensors'
            )
        if leaf == '_packed_params':
            raise TorchFileError('its network is quantised: save the float32 network')


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yields the content of the file, whose tensors can be read until the context ends."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _read_zip(archive, path.stat().st_size)
    else:
        yield _read_sequence(path)


def _read_zip(archive: zipfile.ZipFile, size: int) -> Any:
    names = archive.namelist()
    pickled = [name for name in names if name.split('/')[-1] == 'data.pkl']
    if len(pickled) != 1:
        raise TorchFileError('it is a zip archive, but not a file of PyTorch')
    folder = pickled[0].removesuffix('data.pkl')
    if sum(item.file_size for item in archive.infolist()) > size:
        raise TorchFileError('it is compressed, which PyTorch does not do')
    if f'{folder}byteorder' in names and archive.read(f'{folder}byteorder') != b'little':
        raise TorchFileError('it was written on a big-endian machine')
    storages: dict[str, Storage] = {}

    def storage(key, dtype, numel):
        if key not in storages:
            load = partial(archive.read, f'{folder}data/{key}')
            storages[key] = Storage(dtype, numel, load)
        return storages[key]

    persistent = partial(persistent_storage, storage=storage)
    return Interpreter(persistent).run(io.BytesIO(archive.read(pickled[0])))


def _read_sequence(path: Path) -> Any:
    content = path.read_bytes()
    file = io.BytesIO(content)
    if Interpreter().run(file) != _MAGIC:
        raise TorchFileError(
            'it is a pickle, but not from PyTorch: save a state_dict() with torch.save'
        )
    if Interpreter().run(file) != _PROTOCOL:
        raise TorchFileError('it does not begin like a file of PyTorch')
    Interpreter().run(file)  # skip the description of the machine that wrote it
    storages: dict[str, Storage] = {}

    def storage(key, dtype, numel):
        return storages.setdefault(key, Storage(dtype, numel))

    value = Interpreter(partial(persistent_storage, storage=storage)).run(file)
    for key in Interpreter().run(file):
        numel = int.from_bytes(file.read(8), 'little', signed=True)
        if key not in storages:
            raise TorchFileError('it contains tensors of an unsupported type: save float32 tensors')
        if numel != storages[key].numel or numel < 0:
            raise TorchFileError("a tensor's data is incomplete: download or copy it again")
        end = file.tell() + numel * np.dtype(storages[key].dtype).itemsize
        storages[key].load = partial(_slice, content, file.tell(), end)
        file.seek(end)
    return value


def _slice(content: bytes, begin: int, end: int) -> memoryview:
    return memoryview(content)[begin:end]
