"""Reading and writing graphs: the small ones whole, the others with their weights in one file beside them."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from accel.graph.weights import fingerprint, initializers

EXTERNAL_ABOVE = 1_000_000  # bytes of weights in a graph before they move to a file of their own
INLINE_BELOW = 1024  # bytes of one tensor; shapes and scalars stay in the graph, where shape inference finds them


def data_name(path: Path) -> str:
    """Name of the external data file that belongs to the graph at `path`."""
    return f"{path.name}.data"


def load(path: Path) -> ir.Model:
    """The graph at `path`. Weights are mapped from disk, not read."""
    return ir.load(path)


def save(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, nodes in topological order, and its weights to `<path>.data` when they are large.

    Leaves the model's initializers as they were: they keep pointing at where they came from.
    """
    TopologicalSortPass()(model)
    if weight_bytes(model) > EXTERNAL_ABOVE:
        ir.save(model, path, external_data=data_name(path), size_threshold_bytes=INLINE_BELOW)
    else:
        ir.external_data.load_to_model(model)  # a graph that shrank leaves its old data file behind
        ir.save(model, path)


def dump(model: ir.Model) -> bytes:
    """The graph alone, for a session that is told in which folder its weights lie."""
    dumped: bytes = ir.to_proto(model).SerializeToString()
    return dumped


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph alone: weights that lie in a data file stay there, and a link to it must lie beside `path`."""
    TopologicalSortPass()(model)
    ir.save(model, path)


def save_beside(model: ir.Model, path: Path, other: Path) -> None:
    """Write the graph alone: weights that it has in common with the one at `other`, in the same folder, stay in that
    one's data file. What is its own goes into the graph.
    """
    known = {fingerprint(value): value.const_value for value in initializers(load(other))}
    for value in initializers(model):
        value.const_value = known.get(fingerprint(value), value.const_value)
    _gather(model, other)
    save_graph(model, path)


def _gather(model: ir.Model, other: Path) -> None:
    """Read what lies in data files other than that of the graph at `other`."""
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != other.parent / data_name(other):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included, each at its own type."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def node_count(model: ir.Model) -> int:
    """Nodes of the graph and of all its subgraphs."""
    return sum(1 for _ in model.graph.all_nodes())
