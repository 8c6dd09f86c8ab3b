"""Converts the JAX operations of this package's networks to ONNX, for `onnx_export`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmixup_jax.errors import DataError

Axes = tuple[int, ...]
_TO_CHANNELS_FIRST: Axes = (0, 3, 1, 2)
_TO_CHANNELS_LAST: Axes = (0, 2, 3, 1)


@dataclass(frozen=True)
class Value:
    """The value of a variable in the jaxpr: a tensor of the graph, or a constant."""

    shape: tuple
    """The shape in JAX; the batch size is symbolic."""
    name: str = ''
    """Name of the tensor in the graph; '' for a constant."""
    array: np.ndarray | None = None
    """The constant; None for a tensor."""
    channels_first: bool = False
    """Whether the tensor is [B, C, H, W] where JAX has [B, H, W, C]."""


@dataclass
class Graph:
    """An ONNX graph under construction."""

    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    names: dict[Any, str] = field(default_factory=dict)
    """Names of constants and transposed tensors that the graph already has."""

    def node(self, operation: str, *inputs: str, **attributes) -> str:
        """Adds a node; returns the name of its output."""
        from onnx import helper

        name = f'{operation}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(operation, inputs, [name], name, **attributes))
        return name

    def constant(self, array) -> str:
        """Adds an array, unless the graph has it already; returns its name."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.names:
            self.names[key] = f'constant_{len(self.constants)}'
            self.constants.append(numpy_helper.from_array(array, self.names[key]))
        return self.names[key]

    def integers(self, values) -> str:
        return self.constant(np.asarray(values, np.int64))

    def tensor(self, value: Value, channels_first: bool = False) -> str:
        """Returns the name of a value's tensor in the wanted layout."""
        axes = _TO_CHANNELS_FIRST if channels_first else _TO_CHANNELS_LAST
        if value.array is not None:
            turn = channels_first and value.array.ndim == 4
            return self.constant(value.array.transpose(axes) if turn else value.array)
        if value.channels_first == channels_first:
            return value.name
        key = value.name, axes
        if key not in self.names:
            self.names[key] = self.node('Transpose', value.name, perm=axes)
        return self.names[key]

    def reshape(self, name: str, shape: tuple) -> str:
        """Reshapes a tensor; at most one size may be symbolic."""
        sizes = [size if known(size) else -1 for size in shape]
        require(sizes.count(-1) <= 1, 'reshape with two unknown sizes')
        return self.node('Reshape', name, self.integers(sizes))

    def transpose(self, name: str, axes: Axes) -> str:
        same = tuple(axes) == tuple(range(len(axes)))
        return name if same else self.node('Transpose', name, perm=[int(axis) for axis in axes])


def constant(array) -> Value:
    """A value that is the same for all images."""
    return Value(np.shape(array), array=np.asarray(array))


def known(size) -> bool:
    """Whether the size is a number, not the symbolic batch size."""
    return isinstance(size, int | np.integer)


def require(supported: bool, operation: str) -> None:
    """Raises a DataError that names the operation if it is not supported."""
    if not supported:
        raise DataError(
            f'the network has an operation that cannot be exported to ONNX ({operation}): use '
            '--format=stablehlo'
        )


# One function for each primitive of jax.lax. Each maps (graph, inputs, shape of the output,
# **parameters of the primitive) to the output.


def _elementwise(operation: str) -> Callable[..., Value]:
    """An operation that broadcasts; it is channels-first if any of its inputs is."""

    def convert(graph, given, shape, **_):
        first = any(value.channels_first for value in given)
        name = graph.node(operation, *(graph.tensor(value, first) for value in given))
        return Value(shape, name, channels_first=first)

    return convert


_add, _multiply = _elementwise('Add'), _elementwise('Mul')
_maximum, _relu = _elementwise('Max'), _elementwise('Relu')


def _subtract(graph, given, shape, **_):
    # Runtimes fuse additions into the preceding convolution, but not subtractions.
    x, y = given
    if y.array is not None:
        return _add(graph, [x, constant(-y.array)], shape)
    return _elementwise('Sub')(graph, given, shape)


def _max(graph, given, shape, **_):
    tensors = [value for value in given if value.array is None]
    if len(tensors) == 1 and all(not np.any(v.array) for v in given if v.array is not None):
        return _relu(graph, tensors, shape)
    return _maximum(graph, given, shape)


def _square(graph, given, shape, **_):
    return _multiply(graph, given * 2, shape)


def _rsqrt(graph, given, shape, **_):
    root = _elementwise('Sqrt')(graph, given, shape)
    return _elementwise('Reciprocal')(graph, [root], shape)


def _erfc(graph, given, shape, **_):
    erf = _elementwise('Erf')(graph, given, shape)
    return _elementwise('Sub')(graph, [constant(np.float32(1)), erf], shape)


def _same(graph, given, shape, **_):
    return given[0]


def _convert_element_type(graph, given, shape, new_dtype, **_):
    from onnx import helper

    to = helper.np_dtype_to_tensor_dtype(np.dtype(new_dtype))
    name = graph.node('Cast', graph.tensor(given[0]), to=to)
    return Value(shape, name)


def _reshape(graph, given, shape, dimensions=None, **_):
    require(dimensions is None, 'reshape in another order')
    return Value(shape, graph.reshape(graph.tensor(given[0]), shape))


def _transpose(graph, given, shape, permutation):
    return Value(shape, graph.transpose(graph.tensor(given[0]), permutation))


def _broadcast(graph, given, shape, /, broadcast_dimensions, **_):
    (x,) = given
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    name = graph.tensor(x)
    if tuple(sizes) != tuple(x.shape):
        name = graph.reshape(name, tuple(sizes))
    if tuple(sizes) != tuple(shape):
        batch = graph.node('Shape', 'images', end=1)
        each = [graph.integers([size]) if known(size) else batch for size in shape]
        name = graph.node('Expand', name, graph.node('Concat', *each, axis=0))
    return Value(shape, name)


def _concatenate(graph, given, shape, dimension):
    first = all(value.channels_first for value in given)
    axis = _TO_CHANNELS_FIRST.index(dimension) if first else dimension
    name = graph.node('Concat', *(graph.tensor(value, first) for value in given), axis=axis)
    return Value(shape, name, channels_first=first)


def _reduce(operation: str) -> Callable[..., Value]:
    def convert(graph, given, shape, axes, **_):
        (x,) = given
        # The layouts agree after the reduction only if nothing but [B, C] remains.
        first = x.channels_first and tuple(axes) == (1, 2)
        axes = [_TO_CHANNELS_FIRST.index(axis) if first else axis for axis in axes]
        name = graph.node(operation, graph.tensor(x, first), graph.integers(axes), keepdims=0)
        return Value(shape, name)

    return convert


def _gather(graph, given, shape, dimension_numbers, slice_sizes, **_):
    # Only indexing like x[:, 2]: constant indices, each of which removes an axis.
    x, indices = given
    axes = dimension_numbers.collapsed_slice_dims
    whole = all(
        size == full or axis in axes
        for axis, (size, full) in enumerate(zip(slice_sizes, x.shape, strict=True))
    )
    plain = whole and axes == dimension_numbers.start_index_map
    require(plain and indices.array is not None and indices.array.ndim == 1, 'gather')
    name = graph.tensor(x)
    for axis, index in sorted(zip(axes, indices.array, strict=True), reverse=True):
        name = graph.node('Gather', name, graph.integers(index), axis=axis)
    return Value(shape, name)


def _dot(graph, given, shape, dimension_numbers, **_):
    (contracted, batches) = dimension_numbers
    names, free_sizes = [], []
    for x, contract, batch, is_left in zip(given, contracted, batches, (True, False), strict=True):
        free = [axis for axis in range(len(x.shape)) if axis not in (*contract, *batch)]
        order = (*batch, *free, *contract) if is_left else (*batch, *contract, *free)
        inner = math.prod(x.shape[axis] for axis in contract)
        sizes = [x.shape[axis] for axis in free]
        free_sizes += sizes
        # MatMul takes one free axis on each side; without batch axes, any number on the left.
        outer = sizes if is_left and not batch else [math.prod(sizes)]
        both = [*outer, inner] if is_left else [inner, *outer]
        wanted = tuple([x.shape[axis] for axis in batch] + both)
        if x.array is not None:
            names.append(graph.constant(x.array.transpose(order).reshape(wanted)))
            continue
        name = graph.transpose(graph.tensor(x), order)
        same = tuple(x.shape[axis] for axis in order) == wanted
        names.append(name if same else graph.reshape(name, wanted))
    product = graph.node('MatMul', *names)
    merged = bool(batches[0]) or len(given[1].shape) - len(contracted[1]) != 1
    return Value(shape, graph.reshape(product, shape) if merged else product)


def _convolution(
    graph,
    given,
    shape,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    **_,
):
    x, kernel = given
    axes = dimension_numbers
    usual = (axes.lhs_spec, axes.rhs_spec, axes.out_spec) == (
        _TO_CHANNELS_FIRST,
        (3, 2, 0, 1),
        _TO_CHANNELS_FIRST,
    )
    plain = usual and set(lhs_dilation) == {1} and batch_group_count == 1
    require(plain and kernel.array is not None, 'conv_general_dilated')
    name = graph.node(
        'Conv',
        graph.tensor(x, channels_first=True),
        graph.constant(kernel.array.transpose(axes.rhs_spec)),
        strides=window_strides,
        dilations=rhs_dilation,
        group=feature_group_count,
        pads=_pads(padding),
    )
    return Value(shape, name, channels_first=True)


def _pads(padding) -> list[int]:
    """Padding in ONNX's order: first before all axes, then after all axes."""
    return [int(sides[i]) for i in (0, 1) for sides in padding]


def _pool(operation: str, **attributes) -> Callable[..., Value]:
    """Pools over height and width; a sum is an average times the size of the window."""

    def convert(
        graph,
        given,
        shape,
        window_dimensions,
        window_strides,
        padding,
        base_dilation,
        window_dilation,
    ):
        (x,) = given
        (one, *window, last), dilations = window_dimensions, {*base_dilation, *window_dilation}
        require((one, last, dilations) == (1, 1, {1}), 'pool over other axes')
        name = graph.node(
            operation,
            graph.tensor(x, channels_first=True),
            kernel_shape=window,
            strides=window_strides[1:3],
            pads=_pads(padding[1:3]),
            **attributes,
        )
        if operation == 'AveragePool':
            name = graph.node('Mul', name, graph.constant(np.float32(math.prod(window))))
        return Value(shape, name, channels_first=True)

    return convert


OPERATIONS: dict[str, Callable[..., Value]] = {
    'add': _add,
    'broadcast_in_dim': _broadcast,
    'concatenate': _concatenate,
    'conv_general_dilated': _convolution,
    'convert_element_type': _convert_element_type,
    'copy': _same,
    'div': _elementwise('Div'),
    'dot_general': _dot,
    'erfc': _erfc,
    'exp': _elementwise('Exp'),
    'gather': _gather,
    'logistic': _elementwise('Sigmoid'),
    'max': _max,
    'min': _elementwise('Min'),
    'mul': _multiply,
    'neg': _elementwise('Neg'),
    'reduce_max': _reduce('ReduceMax'),
    'reduce_sum': _reduce('ReduceSum'),
    'reduce_window_max': _pool('MaxPool'),
    'reduce_window_sum': _pool('AveragePool', count_include_pad=1),
    'reshape': _reshape,
    'rsqrt': _rsqrt,
    'square': _square,
    'stop_gradient': _same,
    'sub': _subtract,
    'transpose': _transpose,
}
