"""Content of initializers: read, compared to find the weights that graphs have in common, and transposed."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from copy import copy
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

ORIGIN = "accel.origin"  # key of a tensor's metadata, which isn't saved
BLOCK = 2**20  # bytes of a file that are read at once


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
    if isinstance(tensor, ir.ExternalTensor):
        status = Path(tensor.path).stat()
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        sha256 = _file_digest(tensor.path, tensor.offset or 0, tensor.nbytes, state)
    else:
        sha256 = hashlib.sha256(tensor.tobytes()).hexdigest()
    return (tensor.dtype.name, tuple(tensor.shape.numpy()), sha256)


@lru_cache(maxsize=2**14)  # graphs share files
def _file_digest(path: str, offset: int, length: int, state: tuple[int, ...]) -> str:
    """Return the SHA-256 of a part of a file, which is read in blocks and not mapped, by the file's state."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while length > 0 and (block := file.read(min(length, BLOCK))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


def origin(tensor: ir.TensorProtocol | None) -> Hashable:
    """Return which part of which file a tensor's content is, or how it is made of such parts; None if unknown.

    Tensors of equal origin have equal content, which need not be read to know that.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return "file", str(tensor.path), tensor.offset, tensor.dtype, tuple(tensor.shape.numpy())
    return None if tensor is None else tensor.meta.get(ORIGIN)


def set_origin(
    tensor: ir.TensorProtocol, operation: Hashable, sources: Iterable[ir.TensorProtocol | int | None]
) -> None:
    """Note how a tensor's content is made.

    Args:
        tensor: The tensor.
        operation: Name and attributes of what makes it.
        sources: What it is made of: tensors, and numbers.
    """
    origins = [source if isinstance(source, int) else origin(source) for source in sources]
    if None not in origins:
        tensor.meta[ORIGIN] = (operation, *origins)


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
    set_origin(weight.const_value, ("transpose", tuple(order)), [tensor])
