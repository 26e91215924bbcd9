"""Content of initializers: read, compared to find the weights that graphs have in common, and transposed."""

import hashlib
from collections.abc import Iterable, Sequence
from copy import copy
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir

SHA256 = "accel.sha256"  # key of a tensor's metadata, which isn't saved


def tensor_content(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return a tensor's content. That of an external one is mapped into memory for as long as the array lives.

    `ExternalTensor.numpy` keeps its file mapped as long as the tensor lives, so that a model whose weights were read
    one by one would hold them all.
    """
    array: np.ndarray = (copy(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor).numpy()
    return array


def fingerprint(value: ir.Value) -> tuple[str, tuple[int, ...], str]:
    """Return dtype, shape and SHA-256 of an initializer's content.

    Raises:
        ValueError: `value` has no content.
    """
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"{value.name} is not an initializer with a value")
    sha256 = tensor.meta.get(SHA256)
    if sha256 is None:
        digest = hashlib.sha256()
        if isinstance(tensor, ir.ExternalTensor):
            tensor.tofile(SimpleNamespace(write=digest.update))  # in parts, and not mapped
            tensor.meta[SHA256] = digest.hexdigest()  # its file is read-only, unlike arrays in memory
        else:
            digest.update(tensor.tobytes())
        sha256 = digest.hexdigest()
    return (tensor.dtype.name, tuple(tensor.shape.numpy()), sha256)


def initializers(model: ir.Model) -> list[ir.Value]:
    """Return all initializers that have content, of the main graph and its subgraphs."""
    return [value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None]


def shared_bytes(first: Iterable[ir.Value], second: Iterable[ir.Value]) -> int:
    """Return the bytes of those initializers in `second` whose content is also in `first`."""
    fingerprints = {fingerprint(value) for value in first}
    total = 0
    for value in second:
        if value.const_value is not None and fingerprint(value) in fingerprints:
            total += value.const_value.nbytes
    return total


def transpose(weight: ir.Value, order: Sequence[int]) -> None:
    """Exchange the axes of an initializer, in place. Its content is transposed whenever it is read, and not kept.

    Raises:
        ValueError: `weight` has no content.
    """
    tensor = weight.const_value
    if tensor is None:
        raise ValueError(f"{weight.name} is not an initializer with a value")
    weight.shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor_content(tensor).transpose(order)), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=weight.shape,
        name=weight.name,
    )
