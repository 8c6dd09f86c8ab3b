"""Tensors out of PyTorch's `.pth` files, without PyTorch and without running what they hold.

A `.pth` file is a pickle, and a pickle can call anything. It is never unpickled: the few of its
instructions that a dictionary of tensors is made of are followed here, and anything else is
refused. Both formats are read: the zip archive of PyTorch 1.6 and later, and the sequence of
pickles from before.
"""

import errno
import io
import math
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
_MAX_INSTRUCTIONS = 2_000_000  # some thirty a tensor
# Tensors may share their data; a file whose tensors together are so many times its size is a trap.
_MAX_GROWTH = 16
# What a tensor's data may be wrapped in, from the outside in.
_WRAPPERS = ('state_dict', 'model')


class TorchFileError(ValueError):
    """The file is damaged, or holds something beside tensors; says what."""


@dataclass
class _Storage:
    dtype: Any
    numel: int
    data: np.ndarray = None  # type: ignore[assignment]  # until it is read


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


def _dictionary(pairs=()) -> dict:
    """Stands for collections.OrderedDict."""
    made: dict = {}
    for key, value in pairs:
        _set_item(made, key, value)
    return made


def _set_item(made: dict, key: Any, value: Any) -> None:
    # The hash of a deeply nested key would overflow the interpreter's stack.
    if not isinstance(made, dict) or not isinstance(key, str | int):
        raise TorchFileError('its dictionaries are not those of a state dict')
    made[key] = value


# What a pickle of tensors names, and what stands for it here.
_NAMED: dict[str, Any] = {
    'collections OrderedDict': _dictionary,
    'torch._utils _rebuild_tensor': _rebuild_tensor,
    'torch._utils _rebuild_tensor_v2': _rebuild_tensor,
    'torch._utils _rebuild_parameter': _rebuild_parameter,
    **{f'torch {name}': name for name in _DTYPES},
}
_FUNCTIONS = (_dictionary, _rebuild_tensor, _rebuild_parameter)
_CONSTANTS = {
    'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()
}  # fmt: skip
_VALUES = (
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE',
    'BINSTRING', 'SHORT_BINSTRING',
)  # fmt: skip


def _evaluate(file: io.BytesIO, storage: Callable[[Any, Any, int], _Storage] | None = None) -> Any:
    """The value that the next pickle in the file describes.

    Python's own unpickler is not used: here only the few instructions are known that describe
    dictionaries of tensors and plain values, and none of them can call anything but `_FUNCTIONS`.

    Args:
      file: at the pickle's beginning; at its end afterwards.
      storage: gives a tensor's data by type, key and number of elements.

    Raises:
      TorchFileError: it holds anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    argument: Any  # its type depends on the instruction
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == _MAX_INSTRUCTIONS:
            raise TorchFileError('it is too long for a dictionary of tensors')
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'MARK':
            marks.append(len(stack))
        elif name == 'TUPLE':
            stack.append(tuple(since_mark()))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ('APPEND', 'APPENDS'):
            items = since_mark() if name == 'APPENDS' else [stack.pop()]
            if not isinstance(stack[-1], list):
                raise TorchFileError('its lists are none')
            stack[-1].extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = since_mark() if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set_item(stack[-1], key, value)
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            if name == 'STACK_GLOBAL':
                argument = f'{stack.pop(-2)} {stack.pop()}'
            if argument not in _NAMED:
                raise TorchFileError(
                    f'it holds a {argument.replace(" ", ".")}, which is not a tensor and is not '
                    'loaded: save its state_dict() alone'
                )
            stack.append(_NAMED[argument])
        elif name == 'REDUCE':
            arguments = stack.pop()
            if stack[-1] not in _FUNCTIONS or not isinstance(arguments, tuple):
                raise TorchFileError('it calls something that is no function')
            stack[-1] = stack[-1](*arguments)
        elif name == 'BUILD':
            stack.pop()  # attributes of a dictionary: versions of modules
        elif name == 'BINPERSID':
            # None raises TypeError, which is reported as damage.
            stack[-1] = _persistent(stack[-1], storage)  # type: ignore[arg-type]
        elif name == 'STOP':
            return stack.pop()
        elif name not in ('PROTO', 'FRAME'):
            raise TorchFileError(f'it holds the instruction {name}: save its state_dict() alone')
    raise TorchFileError('it is cut short')


def _persistent(saved: Any, storage: Callable[[Any, Any, int], _Storage]) -> _Storage:
    if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != 'storage':
        raise TorchFileError('a tensor is not described as PyTorch does it')
    dtype, key, numel = saved[1], saved[2], saved[4]
    described = (dtype, key, numel)
    if [type(value) for value in described] != [str, str, int] or dtype not in _DTYPES:
        raise TorchFileError('a tensor is not described as PyTorch does it')
    return storage(_DTYPES[dtype], key, numel)


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
        for wrapper in _WRAPPERS:
            if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
                value = value[wrapper]
        if not isinstance(value, dict) or not value:
            raise TorchFileError(f'it holds a {type(value).__name__}, not a dictionary of tensors')
        odd = [key for key, tensor in value.items() if not isinstance(tensor, _Tensor)]
        if odd:
            raise TorchFileError(f'its entry {odd[0]!r} is not a tensor')
        tensors = {str(key): tensor.array() for key, tensor in value.items()}
    except TorchFileError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place that there is not
            raise
        raise TorchFileError(f'it is damaged ({type(error).__name__}: {error})') from error
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_GROWTH * path.stat().st_size:
        raise TorchFileError('its tensors take far more memory than the file')
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
        if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
            raise TorchFileError('it is compressed, which PyTorch does not do')
        if f'{folder}byteorder' in names and archive.read(f'{folder}byteorder') != b'little':
            raise TorchFileError('it was written on a big-endian machine')
        storages: dict[str, _Storage] = {}

        def storage(dtype, key, numel):
            if key not in storages:
                storages[key] = _filled(dtype, numel, archive.read(f'{folder}data/{key}'))
            return storages[key]

        return _evaluate(io.BytesIO(archive.read(pickled[0])), storage)


def _read_sequence(path: Path) -> Any:
    file = io.BytesIO(path.read_bytes())
    if _evaluate(file) != _MAGIC or _evaluate(file) != _PROTOCOL:
        raise TorchFileError('it does not begin as a file of PyTorch')
    _evaluate(file)  # the machine that wrote it
    storages: dict[str, _Storage] = {}

    def storage(dtype, key, numel):
        return storages.setdefault(key, _Storage(dtype, numel))

    value = _evaluate(file, storage)
    for key in _evaluate(file):
        numel = int.from_bytes(file.read(8), 'little', signed=True)
        if numel != storages[key].numel:
            raise TorchFileError("a tensor's data is cut short")
        raw = file.read(max(0, numel) * np.dtype(storages[key].dtype).itemsize)
        storages[key].data = _filled(storages[key].dtype, numel, raw).data
    return value
