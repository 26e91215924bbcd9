"""Of a prefill, what makes the caches that stay as they are: keys and values of the encoder's output."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.decode.static_cache import Names
from accel.graph.shapes import dims


def cross_cache(prefill: ir.Model, decode: ir.Model, cache: Mapping[str, str]) -> ir.Model | None:
    """A graph of its own for them, over the same weights; None where there are none, as in decoder-only models.

    `cache`: cache input of `step` -> the output, of both, that feeds it.
    """
    fixed = [
        cache[value.name]
        for value in decode.graph.inputs
        if value.name is not None and value.name in cache and Names.past not in (dims(value) or ())
    ]
    if not fixed:
        return None
    graph = convenience.extract(prefill.graph, prefill.graph.inputs, fixed)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    graph.opset_imports.update(prefill.opset_imports)
    return ir.Model(graph, ir_version=prefill.ir_version)
