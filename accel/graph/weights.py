"""Initializers compared by content: which weights two graphs share."""

import hashlib
from collections.abc import Iterable

import onnx_ir as ir


def fingerprint(value: ir.Value) -> tuple[str, tuple[int, ...], str]:
    """Type, shape and SHA-256 of an initializer's content."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"{value.name} is not an initializer with a value")
    return (tensor.dtype.name, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).hexdigest())


def initializers(model: ir.Model) -> list[ir.Value]:
    """Every initializer that has a value, of the graph and of all its subgraphs."""
    return [value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None]


def shared_bytes(first: Iterable[ir.Value], second: Iterable[ir.Value]) -> int:
    """Bytes of the initializers of `second` whose content `first` holds too."""
    known = {fingerprint(value) for value in first}
    return sum(value.const_value.nbytes for value in second if value.const_value and fingerprint(value) in known)
