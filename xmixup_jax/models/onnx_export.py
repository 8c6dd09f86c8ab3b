"""Converts a function from images to logits to an ONNX graph, one jaxpr equation at a time.

It covers the operations of this package's networks at test time, in float32. Values that depend on
no image (scale and shift of a batch norm, indices) are computed during the conversion. Where an
operation has a CPU version, the default one is used instead. Convolutions, pooling and everything
between them use ONNX's layout, [B, C, H, W]; transposes appear only where the layout changes.

The package jax2onnx converts more programs. Its version 0.17.1 fails on the max pooling of a
ResNet, and writes an EfficientNet that ONNX's checker rejects.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from xmixup_jax.models.onnx_operations import OPERATIONS, Graph, Value, constant, known, require

OPSET = 18
"""Version of ONNX's operators; supported by ONNX Runtime 1.14 (2023) and later."""
_IR_VERSION = 8  # of the file format; the oldest for this opset


def to_onnx(
    function: Callable[[jax.Array], jax.Array],
    image_size: int,
    metadata: Mapping[str, str],
) -> Any:
    """Converts a function to an `onnx.ModelProto`.

    Args:
      function: maps uint8 [B, image_size, image_size, 3] to float32 [B, K].
      image_size: in px.
      metadata: entries of `metadata_props`.

    Returns:
      a model with the input `images` and the output `logits`; their first dimension is `batch`.

    Raises:
      DataError: the function has an operation that cannot be converted.
    """
    from onnx import TensorProto, helper

    sizes = (image_size, image_size, 3)
    (batch,) = jax.export.symbolic_shape('batch')
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *sizes), np.uint8))
    graph = Graph()
    (logits,) = _convert(graph, closed, [Value((batch, *sizes), 'images')])
    graph.nodes.append(helper.make_node('Identity', [graph.tensor(logits)], ['logits'], 'logits'))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            'network',
            [helper.make_tensor_value_info('images', TensorProto.UINT8, ('batch', *sizes))],
            [
                helper.make_tensor_value_info(
                    'logits', TensorProto.FLOAT, ('batch', logits.shape[1])
                )
            ],
            graph.constants,
        ),
        producer_name='xmixup-jax',
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid('', OPSET)],
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _convert(graph: Graph, closed: ClosedJaxpr, inputs: list[Value]) -> list[Value]:
    """Adds the equations that the outputs depend on; returns the outputs."""
    jaxpr = closed.jaxpr
    consts = [constant(array) for array in closed.consts]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(variable: Any) -> Value:
        dtype = variable.aval.dtype
        if isinstance(variable, Literal):
            return constant(np.asarray(variable.val, dtype))
        return values[variable]

    for equation in _needed(jaxpr):
        given = [read(variable) for variable in equation.invars]
        values.update(zip(equation.outvars, _equation(graph, equation, given), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _needed(jaxpr) -> list:
    """The equations that an output depends on."""
    needed = {id(variable) for variable in jaxpr.outvars}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if needed & {id(variable) for variable in equation.outvars}:
            kept.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return kept[::-1]


def _equation(graph: Graph, equation, given: list[Value]) -> list[Value]:
    """Adds one equation to the graph, or computes it if it depends on no image."""
    name, params = equation.primitive.name, equation.params
    if name == 'platform_index':
        return [constant(np.int32(params['platforms'].index(None)))]
    if name == 'cond' and (index := given[0].array) is not None:
        return _convert(graph, params['branches'][int(index)], given[1:])
    if (inner := params.get('jaxpr', params.get('call_jaxpr'))) is not None:
        return _convert(graph, inner, given)
    (output,) = equation.outvars
    shape = output.aval.shape
    if all(value.array is not None for value in given) and all(map(known, shape)):
        return [constant(equation.primitive.bind(*(value.array for value in given), **params))]
    require(name in OPERATIONS, name)
    return [OPERATIONS[name](graph, given, shape, **params)]
