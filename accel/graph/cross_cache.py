"""Of a prefill, what makes the caches that stay as they are: keys and values of the encoder's output."""

from collections.abc import Collection, Mapping

import onnx_ir as ir
from onnx_ir import convenience

PAST = "past"  # the axis of a step's caches that grows


def cross_cache(prefill: ir.Model, step: ir.Model, cache: Mapping[str, str]) -> ir.Model | None:
    """A graph of its own for them, over the same weights; None where there are none, as in decoder-only models.

    `cache`: cache input of `step` -> the output, of both, that feeds it.
    """
    fixed = {cache[value.name or ""] for value in step.graph.inputs if value.name in cache and not _grows(value)}
    if not fixed:
        return None
    inputs = _inputs_of(prefill.graph, fixed)
    outputs = [value.name for value in prefill.graph.outputs if value.name in fixed]
    graph = convenience.extract(prefill.graph, inputs, [name for name in outputs if name is not None])
    graph.opset_imports.update(prefill.opset_imports)
    return ir.Model(graph, ir_version=prefill.ir_version)


def _grows(value: ir.Value) -> bool:
    return any(not isinstance(dim, int) and dim.value == PAST for dim in value.shape or ())


def _inputs_of(graph: ir.Graph, outputs: Collection[str | None]) -> list[ir.Value]:
    """The inputs of `graph` that `outputs` are made of."""
    values = [value for value in graph.outputs if value.name in outputs]
    seen = set(values)
    while values:
        node = values.pop().producer()
        made_of = [value for value in (node.inputs if node is not None else ()) if value is not None]
        values += [value for value in made_of if value not in seen]
        seen.update(made_of)
    return [value for value in graph.inputs if value in seen]
