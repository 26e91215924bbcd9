"""Queries about values, shapes and constants, and initializers that hold integers."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from accel.graph.build import add_initializer

Dims = tuple[int | str, ...]
HEADS = (0, 2, 1, 3)  # [B, T, H, K] -> [B, H, T, K] and back
KEYS = (0, 1, 3, 2)  # [B, H, T, K] -> [B, H, K, T]
CUT_KEYS = (0, 2, 3, 1)  # [B, T, H, K] -> [B, H, K, T]


def dims(value: ir.Value | None) -> Dims | None:
    """Return the length or symbol of each axis; None if the rank or any axis is unknown.

    Equal symbols stand for equal lengths.
    """
    if value is None or value.shape is None:
        return None
    axes: list[int | str] = []
    for dim in value.shape:
        axis = dim if isinstance(dim, int) else dim.value
        if axis is None:
            return None
        axes.append(axis)
    return tuple(axes)


def is_vector(value: ir.Value | None, length: int | str) -> bool:
    """Return whether `value` has one axis, of that length."""
    return dims(value) == (length,)


def used_once(value: ir.Value) -> bool:
    """Return whether exactly one node reads `value`, once, and it is no graph output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """Return the node that computes `value` if its operator is one of `ops`, in ONNX's own domain; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the number in a constant of one element; None for any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def permutation(transpose: ir.Node) -> tuple[int, ...]:
    """Return the attribute `perm` of a `Transpose`; empty if it is absent, which reverses all axes."""
    return tuple(transpose.attributes.get_ints("perm", ()))


def reshape_target(source: ir.Value | None, result: ir.Value) -> tuple[int, ...] | None:
    """Return a constant second input for a `Reshape` of `source` into the shape of `result`; None if there is none.

    Symbolic axes of equal position and length are written 0, which copies the input's length. One symbolic axis may be
    written -1, which infers its length, if none is written 0.
    """
    shape, source_shape = dims(result), dims(source) or ()
    if shape is None or 0 in shape:  # a length of 0 would copy
        return None
    target = []
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(source_shape) and source_shape[axis] == dim:
            target.append(0)
        else:
            target.append(-1)
    inferred = target.count(-1)
    return tuple(target) if inferred == 0 or (inferred == 1 and 0 not in target) else None


def broadcast(shapes: Sequence[Dims]) -> Dims | None:
    """Return the shape that all `shapes` broadcast to; None if symbols leave it open."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[int | str] = []
    for axis in range(-rank, 0):
        lengths = {shape[axis] for shape in shapes if len(shape) >= -axis}
        lengths.discard(1)
        if len(lengths) > 1:
            return None
        result.append(lengths.pop() if lengths else 1)
    return tuple(result)


def integers(graph: ir.Graph, prefix: str, values: Sequence[int]) -> ir.Value:
    """Return an initializer that holds a vector of int64, registered at first use.

    Its name is made of `prefix` and the values, and so is the same in every graph, as sharing of weights needs it.
    """
    name = "_".join((prefix, *map(str, values)))
    if name not in graph.initializers:
        add_initializer(graph, name, np.array(values, np.int64))
    return graph.initializers[name]


def integer(graph: ir.Graph, value: int) -> ir.Value:
    """Return an initializer that holds an int64 scalar, registered at first use, of the same name in every graph."""
    name = f"scalar_{value}"
    if name not in graph.initializers:
        add_initializer(graph, name, np.array(value, np.int64))
    return graph.initializers[name]
