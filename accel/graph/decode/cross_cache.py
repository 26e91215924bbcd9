"""Extraction of the part of prefill that computes the cross-attention caches."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.decode.static_cache import Names
from accel.graph.shapes import dims


def cross_cache(prefill: ir.Model, decode: ir.Model, cache: Mapping[str, str]) -> ir.Model | None:
    """Return a model that computes only the cross-attention caches from the encoder's output.

    Args:
        prefill: Model to extract it from; not changed. The result shares its weights.
        decode: Model that reads the caches. A cache input without an axis of past tokens is a cross-attention cache.
        cache: Cache input of `decode` -> output of `prefill` that becomes that input.

    Returns:
        The model; None if there are no such caches, as in decoder-only models.
    """
    outputs = []
    for value in decode.graph.inputs:
        if value.name is not None and value.name in cache and Names.past not in (dims(value) or ()):
            outputs.append(cache[value.name])
    if not outputs:
        return None
    graph = convenience.extract(prefill.graph, prefill.graph.inputs, outputs)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    graph.opset_imports.update(prefill.opset_imports)
    return ir.Model(graph, ir_version=prefill.ir_version)
