"""Base class of accel's graph passes, and how one runs over graphs that share weights.

A pass is an `onnx_ir.passes.InPlacePass` with a name and a description. `accel.graph.registry` lists all passes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

logger = logging.getLogger(__name__)


class NoMatchError(Exception):
    """A subgraph looks like what a fusion replaces, but differs from it; the message says in what."""


class GraphPass(InPlacePass):
    """Rewrite a model in place, and report whether anything changed.

    A subclass implements `call(model)` and returns `PassResult(model, modified)`. One that changes weights which
    several models share also overrides `prepare`, and decides there over all of them: a weight changes in all models or
    in none, so that the models keep holding equal bytes.

    Attributes:
        name: Key of the pass in `optimize.passes` or `convert.decode_passes`.
        description: One line on what the pass does, for the table that stage `optimize` prints.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    def prepare(self, models: Sequence[ir.Model]) -> None:
        """Inspect all models that share weights, before the first of them changes."""

    def rewrite_each(self, nodes: Iterable[ir.Node], rewrite: Callable[[ir.Node], None]) -> bool:
        """Rewrite the subgraph at each node, and log why where that isn't possible.

        Args:
            nodes: Nodes at which the subgraphs end, or which they are built around.
            rewrite: Function that changes the graph, or raises `NoMatchError` before it changes anything.

        Returns:
            Whether any subgraph was rewritten.
        """
        modified = False
        for node in nodes:
            try:
                rewrite(node)
            except NoMatchError as error:
                self.log_miss(node, error)
            else:
                modified = True
        return modified

    def log_miss(self, node: ir.Node, reason: object) -> None:
        """Log at level DEBUG why the subgraph that ends in `node` isn't rewritten."""
        logger.debug("%s: no match at %s %r: %s", self.name, node.op_type, node.name, reason)


def run_pass(graph_pass: GraphPass, models: Sequence[ir.Model]) -> bool:
    """Run a pass over all models that share weights.

    Returns:
        Whether any model changed.
    """
    graph_pass.prepare(models)
    modified = [graph_pass(model).modified for model in models]
    return any(modified)


def remove_unused(model: ir.Model, modified: bool = True) -> PassResult:
    """Remove nodes and initializers that nothing reads any more.

    Args:
        model: Changed in place.
        modified: Whether the caller changed the model already.
    """
    before = _size(model)  # the library doesn't report optional inputs and outputs that it removes
    modified |= RemoveUnusedNodesPass()(model).modified
    return PassResult(model, modified or _size(model) != before)


def _size(model: ir.Model) -> tuple[int, int]:
    """Return the numbers of inputs and of named outputs of all nodes, which change wherever one is removed."""
    inputs = outputs = 0
    for graph in model.graphs():
        for node in graph:
            inputs += len(node.inputs)
            outputs += sum(1 for value in node.outputs if value.name)
    return inputs, outputs


def snapshot(model: ir.Model) -> list[object]:
    """Return what is saved of a model except the content of its weights, for comparison with a later snapshot.

    Tells whether a model changed where a library's function doesn't report it.
    """
    state: list[object] = [dict(model.opset_imports), list(model.functions)]
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs):
            state.append(_saved(value))
        state.append((graph.name, graph.doc_string, dict(graph.metadata_props)))
        for node in graph:
            inputs = [None if value is None else value.name for value in node.inputs]
            state.append((node.name, node.op_identifier(), inputs, tuple(node.attributes.values())))
            state.append((node.doc_string, dict(node.metadata_props), [_saved(value) for value in node.outputs]))
    return state


def _saved(value: ir.Value) -> tuple[object, ...]:
    """Return what is saved of a value."""
    shape = None if value.shape is None else tuple(value.shape)
    return value.name, type(value.type), value.dtype, shape, value.const_value, dict(value.metadata_props)


def by_name(passes: Iterable[type[GraphPass]]) -> dict[str, type[GraphPass]]:
    """Return the passes by name, in their order."""
    return {each.name: each for each in passes}
