"""A safe interpreter for pickles of tensors.

A pickle can call any function. This interpreter imports nothing and calls only its own functions:
it builds dictionaries, lists, plain values and PyTorch's tensors, and replaces every other object
by a `Foreign`, an inert placeholder.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

DTYPES = {
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
    'ComplexFloatStorage': np.complex64,
    'ComplexDoubleStorage': np.complex128,
}
_MAX_INSTRUCTIONS = 2_000_000  # a tensor takes about thirty
_MAX_RANK = 32
_MAX_NAME = 1000  # characters


class TorchFileError(ValueError):
    """The file is corrupted or contains no tensors; says what is wrong and what to do."""


@dataclass(eq=False, slots=True)
class Foreign:
    """A placeholder for a class, a function or an object that is not built."""

    name: str
    """MODULE.NAME of its class, or of the function that would have made it."""
    items: dict[str | int, Any] | None = None
    """The entries, if the object is of a subclass of dict."""
    state: Any = None
    """The pickled attributes of the object, usually a dict."""


@dataclass(eq=False)
class Storage:
    """The data of one or more tensors, read on first use."""

    dtype: Any
    numel: int
    load: Callable[[], bytes | memoryview] | None = None
    _data: np.ndarray | None = None

    @property
    def data(self) -> np.ndarray:
        if self._data is None:
            raw = self.load() if self.load else b''
            if self.numel < 0 or len(raw) != self.numel * np.dtype(self.dtype).itemsize:
                raise TorchFileError("a tensor's data is incomplete: download or copy it again")
            self._data = np.frombuffer(raw, self.dtype)
        return self._data


@dataclass(eq=False)
class Tensor:
    """A view into a storage; offset and strides are in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Returns the values as a read-only array.

        Raises:
          TorchFileError: the tensor reaches beyond its data, or the data is incomplete.
        """
        values = (self.offset, *self.size[:_MAX_RANK], *self.stride[:_MAX_RANK])
        if not len(self.size) == len(self.stride) <= _MAX_RANK or not all(
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


@dataclass(eq=False)
class _Known:
    """A function of this module, called in place of PyTorch's."""

    call: Callable[..., Any]


@dataclass(eq=False)
class _Type:
    """The class of a storage, such as `FloatStorage`."""

    name: str


def _tensor(storage, offset, size, stride, *others) -> Tensor | Foreign:
    del others  # requires_grad, hooks
    if isinstance(storage, Foreign):
        return storage
    if not isinstance(storage, Storage) or not all(
        isinstance(value, tuple | list) for value in (size, stride)
    ):
        raise TorchFileError('a tensor is not described in the way PyTorch does it')
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _first(data, *others) -> Any:
    """Rebuilds a parameter, or a tensor saved on another device, as a plain tensor."""
    del others
    return data


def _subclassed(function, type_, arguments, *others) -> Any:
    """Rebuilds a tensor of a subclass as a plain tensor."""
    del others
    if isinstance(function, _Known) and isinstance(arguments, tuple):
        return _TENSORS['torch._utils _rebuild_tensor_v2'].call(*arguments)
    return Foreign(type_.name if isinstance(type_, Foreign) else 'torch.Tensor')


def _dictionary(pairs=()) -> dict:
    """Replaces collections.OrderedDict."""
    made: dict = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        set_item(made, key, value)
    return made


def _default_dictionary(*others) -> dict:
    """Replaces collections.defaultdict."""
    del others  # default_factory
    return {}


def set_item(made: Any, key: Any, value: Any) -> None:
    """Sets an entry; ignores keys other than strings and 64-bit integers."""
    if isinstance(made, Foreign) and made.items is None:
        made.items = {}
    items = made.items if isinstance(made, Foreign) else made
    if not isinstance(items, dict):
        raise TorchFileError('it is corrupted: it sets items of something other than a dictionary')
    # Hashing a deeply nested key overflows the stack; hashing a huge integer takes very long.
    if isinstance(key, str) or (isinstance(key, int) and -(2**63) < key < 2**63):
        items[key] = value


_TENSORS = {
    'torch._utils _rebuild_tensor': _Known(_tensor),
    'torch._utils _rebuild_tensor_v2': _Known(_tensor),
}
# The globals that a pickle of tensors names, and their replacements here.
_NAMED: dict[str, Any] = {
    'collections OrderedDict': _Known(_dictionary),
    'collections defaultdict': _Known(_default_dictionary),
    **_TENSORS,
    'torch._utils _rebuild_parameter': _Known(_first),
    'torch._utils _rebuild_parameter_with_state': _Known(_first),
    'torch._utils _rebuild_device_tensor_from_cpu_tensor': _Known(_first),
    'torch._tensor _rebuild_from_type_v2': _Known(_subclassed),
    **{f'torch {name}': _Type(name) for name in DTYPES},
}
_VALUES = (
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT',
    'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE',
    'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8',
)  # fmt: skip


class Interpreter:
    """Evaluates one pickle.

    Unlike Python's own unpickler, it imports nothing and calls only the functions in `_NAMED`.
    """

    def __init__(self, persistent: Callable[[Any], Any] | None = None):
        """Makes an interpreter with an empty stack.

        Args:
          persistent: maps the persistent id of a tensor's data to the data, see
            `persistent_storage`.
        """
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, file: IO[bytes]) -> Any:
        """Evaluates the next pickle in the file, and leaves the file at the end of that pickle.

        Raises:
          TorchFileError: the pickle is too long, or has an instruction that such files never need.
          Exception: a corrupted pickle can raise nearly anything.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count == _MAX_INSTRUCTIONS:
                raise TorchFileError('it is too long for a dictionary of tensors')
            name = opcode.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name == 'STOP':
                return self._stack.pop()
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise TorchFileError(
                    f'it contains the pickle instruction {name}: save only its state_dict()'
                )
        raise TorchFileError('it is incomplete: download or copy it again')

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        place = self._marks.pop()
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _pop(self, _) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise TorchFileError('it is corrupted: download or copy it again')
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise TorchFileError('it is corrupted: it appends to something other than a list')

    def _set(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(self._stack[-1], key, value)

    def _dict(self, _) -> None:
        items = self._since_mark()
        self._push({})
        self._set(items)

    def _global(self, name: str | None) -> None:
        if name is None:
            parts = [self._stack.pop(-2), self._stack.pop()]
            if not all(isinstance(part, str) and len(part) < _MAX_NAME for part in parts):
                raise TorchFileError('it is corrupted: a name is not a short string')
            name = ' '.join(parts)
        self._push(_NAMED.get(name) or Foreign(name.replace(' ', '.')))

    def _call(self, function: Any, arguments: Any) -> None:
        """Pushes what a known function returns, or a placeholder."""
        if isinstance(function, Foreign | _Type):
            if function.name in ('copyreg._reconstructor', 'copy_reg._reconstructor'):
                function = arguments[0]  # the class of an object, in protocols 0 and 1
            self._push(Foreign(getattr(function, 'name', 'object')))
            return
        if not isinstance(function, _Known) or not isinstance(arguments, tuple):
            raise TorchFileError('it is corrupted: it calls something that is not a function')
        self._copied += sum(
            len(each) for each in arguments if isinstance(each, list | tuple | dict)
        )
        if self._copied > _MAX_INSTRUCTIONS:
            raise TorchFileError('it is too long for a dictionary of tensors')
        self._push(function.call(*arguments))

    def _reduce(self, _) -> None:
        arguments = self._stack.pop()
        self._call(self._stack.pop(), arguments)

    def _new_with_keywords(self, _) -> None:
        self._stack.pop()
        self._reduce(None)

    def _object(self, _) -> None:
        function, *arguments = self._since_mark()
        self._call(function, tuple(arguments))

    def _instance(self, name: str) -> None:
        self._since_mark()
        self._push(Foreign(name.replace(' ', '.')))

    def _build(self, _) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Foreign):
            self._stack[-1].state = state
        # Otherwise attributes of a dictionary, the versions of modules, which are not needed.

    def _find_persistent(self, _) -> None:
        if self._persistent is None:
            raise TorchFileError('it is corrupted: it has data outside of tensors')
        self._stack[-1] = self._persistent(self._stack[-1])


_STEPS: dict[str, Callable[[Interpreter, Any], Any]] = {
    'PROTO': lambda self, _: None,
    'FRAME': lambda self, _: None,
    'NONE': lambda self, _: self._push(None),
    'NEWTRUE': lambda self, _: self._push(True),
    'NEWFALSE': lambda self, _: self._push(False),
    'EMPTY_TUPLE': lambda self, _: self._push(()),
    'EMPTY_DICT': lambda self, _: self._push({}),
    'EMPTY_LIST': lambda self, _: self._push([]),
    'EMPTY_SET': lambda self, _: self._push(Foreign('set')),
    'MARK': lambda self, _: self._marks.append(len(self._stack)),
    'POP': Interpreter._pop,
    'POP_MARK': lambda self, _: self._since_mark(),
    'DUP': lambda self, _: self._push(self._stack[-1]),
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'), Interpreter._put),
    **dict.fromkeys(
        ('GET', 'BINGET', 'LONG_BINGET'), lambda self, place: self._push(self._memo[place])
    ),
    'TUPLE': lambda self, _: self._push(tuple(self._since_mark())),
    'TUPLE1': lambda self, _: self._tuple(1),
    'TUPLE2': lambda self, _: self._tuple(2),
    'TUPLE3': lambda self, _: self._tuple(3),
    'LIST': lambda self, _: self._push(self._since_mark()),
    'DICT': Interpreter._dict,
    'FROZENSET': lambda self, _: self._instance('frozenset'),
    'APPEND': lambda self, _: self._append([self._stack.pop()]),
    'APPENDS': lambda self, _: self._append(self._since_mark()),
    'ADDITEMS': lambda self, _: self._append(self._since_mark()),
    'SETITEM': lambda self, _: self._set([self._stack.pop(-2), self._stack.pop()]),
    'SETITEMS': lambda self, _: self._set(self._since_mark()),
    **dict.fromkeys(('GLOBAL', 'STACK_GLOBAL'), Interpreter._global),
    **dict.fromkeys(('REDUCE', 'NEWOBJ'), Interpreter._reduce),
    'NEWOBJ_EX': Interpreter._new_with_keywords,
    'OBJ': Interpreter._object,
    'INST': Interpreter._instance,
    'BUILD': Interpreter._build,
    'BINPERSID': Interpreter._find_persistent,
}


def persistent_storage(saved: Any, storage: Callable[[str, Any, int], Storage]) -> Any:
    """Resolves the persistent id of a tensor's data in a pickle of PyTorch.

    Args:
      saved: the persistent id: ('storage', type, key, device, number of elements), in old files
        with a view as well; or ('module', class, ...) for a pickled network in an old file.
      storage: maps (key, NumPy dtype, number of elements) to the data.
    """
    if isinstance(saved, tuple) and len(saved) > 1 and saved[0] == 'module':
        return saved[1]
    if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != 'storage':
        raise TorchFileError('a tensor is not described in the way PyTorch does it')
    kind, key, numel = saved[1], saved[2], saved[4]
    if isinstance(kind, Foreign):
        return kind  # quantised numbers, for example
    if not isinstance(kind, _Type) or type(key) is not str or type(numel) is not int:
        raise TorchFileError('a tensor is not described in the way PyTorch does it')
    if len(saved) > 5 and saved[5] is not None:
        raise TorchFileError(
            'its tensors share data as in PyTorch before 0.4: save it again with a newer PyTorch'
        )
    return storage(key, DTYPES[kind.name], numel)
