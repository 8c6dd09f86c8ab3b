"""Tensors out of PyTorch's `.pth` files, without PyTorch and without running what they hold.

A `.pth` file is a pickle, and a pickle can call anything. Here its instructions are read through
beforehand, and the only things that it may name are those that a dictionary of tensors is made of;
each stands for a harmless function of this file. Both formats are read: the zip archive of
PyTorch 1.6 and later, and the sequence of pickles from before.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}
# What a tensor's data may be wrapped in, from the outside in.
_WRAPPERS = ('state_dict', 'model')


class TorchFileError(ValueError):
    """The file is damaged, or holds something beside tensors; says what."""


@dataclass
class _Storage:
    dtype: Any
    numel: int
    data: np.ndarray | None = None


@dataclass
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        values = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(
            isinstance(value, int) and value >= 0 for value in values
        ):
            raise TorchFileError('a tensor has an impossible shape')
        storage = self.storage
        count = math.prod(self.size)
        steps = zip(self.size, self.stride, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        if count and (last >= storage.numel or count > storage.numel):
            raise TorchFileError('a tensor reaches beyond its data')
        if not count:
            return np.zeros(self.size, storage.dtype)
        strides = [stride * storage.data.itemsize for stride in self.stride]
        data = storage.data[self.offset :]
        return np.lib.stride_tricks.as_strided(data, self.size, strides, writeable=False)


def _rebuild_tensor(storage, offset, size, stride, *others) -> _Tensor:
    del others  # requires_grad, hooks
    if not isinstance(storage, _Storage) or not isinstance(size, tuple | list):
        raise TorchFileError('a tensor is not described as PyTorch does it')
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data, *others) -> _Tensor:
    del others
    return data


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of `_Tensor`s and plain values; everything else is refused."""

    def __init__(self, file, storage: Callable[[Any, Any, int], _Storage]):
        super().__init__(file, encoding='utf-8')
        self._storage = storage

    def find_class(self, module, name):
        allowed = {
            ('collections', 'OrderedDict'): collections.OrderedDict,
            ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
            ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
            ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
        }
        if module == 'torch' and name in _DTYPES:
            return name  # never called: only `persistent_load` sees it
        if (module, name) not in allowed:
            raise TorchFileError(
                f'it holds a {module}.{name}, which is not a tensor and is not loaded: save its '
                'state_dict() alone'
            )
        return allowed[module, name]

    def persistent_load(self, saved):
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != 'storage':
            raise TorchFileError('a tensor is not described as PyTorch does it')
        dtype, key, numel = saved[1], saved[2], saved[4]
        if not isinstance(numel, int) or dtype not in _DTYPES:
            raise TorchFileError('a tensor is not described as PyTorch does it')
        return self._storage(_DTYPES[dtype], key, numel)


def _unpickle(file: io.BytesIO, storage=None) -> Any:
    """The next pickle in the file."""
    begun = file.tell()
    length = len(file.getbuffer())
    for opcode, argument, _ in pickletools.genops(file):
        # The unpickler makes room for a memory of the largest number that it is told.
        if 'PUT' in opcode.name and argument is not None and argument >= length:
            raise TorchFileError('its pickle numbers its parts wildly')
    file.seek(begun)
    return _Unpickler(file, storage).load()


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, or of the 'state_dict' or 'model' entry of a checkpoint.

    Returns:
      key to array; float16 and bfloat16 become float32. 'module.' before all keys is taken off.

    Raises:
      TorchFileError: see there.
      OSError: the file cannot be read.
    """
    try:
        value = _read_zip(path) if zipfile.is_zipfile(path) else _read_sequence(path)
    except (TorchFileError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise TorchFileError(f'it is damaged ({type(error).__name__}: {error})') from error
    for wrapper in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
    if not isinstance(value, dict) or not value:
        raise TorchFileError(f'it holds a {type(value).__name__}, not a dictionary of tensors')
    odd = [key for key, tensor in value.items() if not isinstance(tensor, _Tensor)]
    if odd:
        raise TorchFileError(f'its entry {odd[0]!r} is not a tensor')
    tensors = {str(key): tensor.array() for key, tensor in value.items()}
    if all(key.startswith('module.') for key in tensors):
        tensors = {key.removeprefix('module.'): tensor for key, tensor in tensors.items()}
    return {
        key: tensor.astype(np.float32)
        if tensor.dtype in (np.float16, ml_dtypes.bfloat16)
        else tensor
        for key, tensor in tensors.items()
    }


def _filled(dtype, numel: int, raw: bytes) -> _Storage:
    if numel < 0 or len(raw) != numel * np.dtype(dtype).itemsize:
        raise TorchFileError("a tensor's data is cut short")
    return _Storage(dtype, numel, np.frombuffer(raw, dtype))


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = [name for name in names if name.split('/')[-1] == 'data.pkl']
        if len(pickled) != 1:
            raise TorchFileError('it is a zip archive, but not one of PyTorch')
        folder = pickled[0].removesuffix('data.pkl')
        if any(item.compress_size < item.file_size for item in archive.infolist()):
            raise TorchFileError('it is compressed, which PyTorch does not do')
        if f'{folder}byteorder' in names and archive.read(f'{folder}byteorder') != b'little':
            raise TorchFileError('it was written on a big-endian machine')
        storages: dict[str, _Storage] = {}

        def storage(dtype, key, numel):
            if key not in storages:
                storages[key] = _filled(dtype, numel, archive.read(f'{folder}data/{key}'))
            return storages[key]

        return _unpickle(io.BytesIO(archive.read(pickled[0])), storage)


def _read_sequence(path: Path) -> Any:
    file = io.BytesIO(path.read_bytes())
    if _unpickle(file) != _MAGIC or _unpickle(file) != _PROTOCOL:
        raise TorchFileError('it does not begin as a file of PyTorch')
    _unpickle(file)  # the machine that wrote it
    storages: dict[str, _Storage] = {}

    def storage(dtype, key, numel):
        return storages.setdefault(key, _Storage(dtype, numel))

    value = _unpickle(file, storage)
    for key in _unpickle(file):
        numel = int.from_bytes(file.read(8), 'little', signed=True)
        if numel != storages[key].numel:
            raise TorchFileError("a tensor's data is cut short")
        raw = file.read(max(0, numel) * np.dtype(storages[key].dtype).itemsize)
        storages[key].data = _filled(storages[key].dtype, numel, raw).data
    return value
