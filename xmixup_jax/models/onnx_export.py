"""Writes a function from images to logits as an ONNX graph, equation by equation of its jaxpr.

The operations are those of this package's networks at test time, in float32. What depends on no
image is computed here (the scale and shift of a batch norm, indices), and of operations that
differ between platforms the default is taken, not the one for CPUs. Convolutions, pools and what
is between them run in ONNX's layout, [B, C, H, W]; there is a transpose only where the layout
changes.

The package jax2onnx does the same for more programs. Its version 0.17.1 stops at the max pool of a
ResNet, and the EfficientNet that it writes does not pass ONNX's checker.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from xmixup_jax.models.onnx_operations import OPERATIONS, Graph, Value, check, constant, known

OPSET = 18
"""Of ONNX; ONNX Runtime reads it from version 1.14 (2023) on."""
_IR_VERSION = 8  # of the file; the oldest for this opset


def to_onnx(
    function: Callable[[jax.Array], jax.Array],
    image_size: int,
    metadata: Mapping[str, str],
) -> Any:
    """The `onnx.ModelProto` of a function.

    Args:
      function: from uint8 [B, image_size, image_size, 3] to float32 [B, K].
      image_size: in px.
      metadata: entries of `metadata_props`.

    Returns:
      a model with the input `images` and the output `logits`, whose first size is `batch`.

    Raises:
      DataError: the function has an operation that is not known here.
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
    """The outputs of one equation."""
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
    check(name in OPERATIONS, name)
    return [OPERATIONS[name](graph, given, shape, **params)]
