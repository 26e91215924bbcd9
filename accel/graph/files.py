"""Reading and writing of ONNX files, with large weights in an external data file beside the graph."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from accel.graph.weights import fingerprint, initializers, origin

EXTERNAL_ABOVE = 1_000_000  # bytes of all weights; those of larger models go to an external data file
INLINE_BELOW = 1024  # bytes of one tensor; smaller ones stay in the graph, where shape inference can read them


def data_name(path: Path) -> str:
    """Return the name of the external data file that belongs to the graph at `path`."""
    return f"{path.name}_data"


def load(path: Path) -> ir.Model:
    """Load the model at `path`. External weights are memory-mapped when they are first read."""
    return ir.load(path)


def save(model: ir.Model, path: Path) -> None:
    """Write a model to `path`, and its weights to `<path>_data` if they exceed `EXTERNAL_ABOVE`.

    Nodes are sorted topologically, in place. The initializers of a model that is saved with external data are
    unchanged: they don't refer to the new file.
    """
    TopologicalSortPass()(model)
    if weight_bytes(model) > EXTERNAL_ABOVE:
        ir.save(model, path, external_data=data_name(path), size_threshold_bytes=INLINE_BELOW)
    else:
        # Weights may be external, in the file of a larger model that this one was derived from.
        ir.external_data.load_to_model(model)
        ir.save(model, path)


def dump(model: ir.Model) -> bytes:
    """Serialize a model without its external weights, for a session that is given the folder of their data file."""
    dumped: bytes = ir.to_proto(model).SerializeToString()
    return dumped


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a model to `path` without its external weights, whose data file must be, or be linked, beside `path`.

    Nodes are sorted topologically, in place.
    """
    TopologicalSortPass()(model)
    ir.save(model, path)


def save_beside(model: ir.Model, path: Path, other: Path) -> None:
    """Write a model to `path` so that it shares weights with another in the same folder.

    Weights of equal content are read from the other model's external data file. All others are stored in the graph.

    Args:
        model: Model to write. Its initializers are changed to refer to those files.
        path: File to write.
        other: Graph of the model to share weights with, in the folder of `path`.
    """
    tensors = {fingerprint(value): value.const_value for value in initializers(load(other))}
    for value in initializers(model):
        value.const_value = tensors.get(fingerprint(value), value.const_value)
    _load_foreign_weights(model, other)
    save_graph(model, path)


def save_sharing(model: ir.Model, path: Path, other: ir.Model, other_path: Path) -> None:
    """Write a model to `path` so that the weights which another model has as well are stored once, in its file.

    Weights are the same where their origin is known to be (see `accel.graph.weights.origin`), so their content isn't
    compared. Where this is less than half of them, the model is written by itself.

    Args:
        model: Model to write. Its initializers are changed to refer to the other model's file.
        path: File to write.
        other: Model that was written to `other_path` by `save`, unchanged since.
        other_path: Its file, in the folder of `path`.
    """
    written = {value.name: value.const_value for value in initializers(load(other_path))}
    tensors = {origin(value.const_value): written.get(value.name) for value in initializers(other)}
    shared: dict[ir.Value, ir.ExternalTensor] = {}
    for value in initializers(model):
        tensor = tensors.get(origin(value.const_value)) if origin(value.const_value) is not None else None
        if isinstance(tensor, ir.ExternalTensor):
            shared[value] = tensor
    if sum(tensor.nbytes for tensor in shared.values()) < weight_bytes(model) / 2:
        save(model, path)
        return
    for value, tensor in shared.items():
        value.const_value = tensor
    _load_foreign_weights(model, other_path)
    save_graph(model, path)


def _load_foreign_weights(model: ir.Model, other: Path) -> None:
    """Load external weights into memory, except those in the data file of the graph at `other`."""
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != other.parent / data_name(other):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, those of subgraphs included."""
    return sum(value.const_value.nbytes for value in initializers(model) if value.const_value is not None)


def node_count(model: ir.Model) -> int:
    """Return the number of nodes, those of subgraphs included."""
    return sum(1 for _ in model.graph.all_nodes())
