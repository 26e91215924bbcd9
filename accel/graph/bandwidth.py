"""Memory traffic of a decode step: the lower bound for its time where memory bandwidth is the bottleneck."""

from collections.abc import Collection, Mapping

import onnx_ir as ir

from accel.graph.weights import initializers


def bytes_read(decode: ir.Model, caches: Collection[str], lengths: Mapping[str, int]) -> int:
    """Return the bytes that a decode step must read: its weights and caches, each once.

    A table that is only indexed by `Gather`, such as an embedding that isn't tied to the head, does not count: a decode
    step reads one row of it per token.

    Args:
        decode: Decode graph.
        caches: Names of the inputs that are caches.
        lengths: Length of each symbolic dimension of the caches, such as the batch or the number of past tokens.
    """
    total = 0
    for value in initializers(decode):
        if value.const_value is not None and not _is_lookup_table(value):
            total += value.const_value.nbytes
    for value in decode.graph.inputs:
        if value.name in caches:
            total += _byte_size(value, lengths)
    return total


def _is_lookup_table(value: ir.Value) -> bool:
    """Return whether nodes read single rows of `value` only."""
    return all(node.op_type == "Gather" and index == 0 for node, index in value.uses())


def _byte_size(value: ir.Value, lengths: Mapping[str, int]) -> int:
    """Return the size of a graph input in bytes, its symbolic dimensions replaced by `lengths`."""
    size = value.dtype.itemsize if value.dtype is not None else 0
    for dim in value.shape or ():
        size *= dim if isinstance(dim, int) else lengths[dim.value or ""]
    return int(size)
