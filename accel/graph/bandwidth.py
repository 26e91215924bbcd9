"""What a step must read from memory, however well it is written: its limit, where memory is what it waits for."""

from collections.abc import Collection, Mapping

import onnx_ir as ir

from accel.graph.weights import initializers


def bytes_read(decode: ir.Model, caches: Collection[str], lengths: Mapping[str, int]) -> int:
    """Bytes of the weights that a step computes with, and of its `caches` (inputs) at `lengths`, axis -> length.

    Of a table that is only looked up, one row is read: none of it counts.
    """
    weights = sum(
        value.const_value.nbytes
        for value in initializers(decode)
        if value.const_value is not None and not _looked_up(value)
    )
    return weights + sum(_size(value, lengths) for value in decode.graph.inputs if value.name in caches)


def _looked_up(value: ir.Value) -> bool:
    return all(node.op_type == "Gather" and index == 0 for node, index in value.uses())


def _size(value: ir.Value, lengths: Mapping[str, int]) -> int:
    size = value.dtype.itemsize if value.dtype is not None else 0
    for dim in value.shape or ():
        size *= dim if isinstance(dim, int) else lengths[dim.value or ""]
    return int(size)
