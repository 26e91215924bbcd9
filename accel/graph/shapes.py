"""What the exporter noted about a value's shape, as far as it is certain."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Dims = tuple[int | str, ...]
HEADS = (0, 2, 1, 3)  # [B, T, H, K] -> [B, H, T, K] and back


def dims(value: ir.Value | None) -> Dims | None:
    """Lengths and symbols of all axes; None if the rank or any axis is unknown. Equal symbols are equal lengths."""
    if value is None or value.shape is None:
        return None
    found = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    known = tuple(dim for dim in found if dim is not None)
    return known if len(known) == len(found) else None


def is_vector(value: ir.Value | None, length: int | str) -> bool:
    """Whether `value` has one axis, of that length."""
    return dims(value) == (length,)


def used_once(value: ir.Value) -> bool:
    """Whether exactly one node reads `value`, once, and no caller does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of these standard operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def order(turn: ir.Node) -> tuple[int, ...]:
    """The axes of a `Transpose`, as it spells them; empty if it reverses them all by default."""
    return tuple(turn.attributes.get_ints("perm", ()))


def reshape_target(given: ir.Value | None, made: ir.Value) -> tuple[int, ...] | None:
    """A constant that makes a `Reshape` turn the shape of `given` into that of `made`; None if none can.

    An axis that keeps its place and length is written 0, which copies it.
    """
    wanted = dims(made)
    if wanted is None or 0 in wanted:  # a 0 would copy
        return None
    source: Dims = dims(given) or ()
    kept = [index < len(source) and dim == source[index] for index, dim in enumerate(wanted)]
    target = tuple(dim if isinstance(dim, int) else 0 if same else -1 for dim, same in zip(wanted, kept, strict=True))
    return target if -1 not in target or (target.count(-1) == 1 and 0 not in target) else None


def integers(graph: ir.Graph, kind: str, values: Sequence[int]) -> ir.Value:
    """An initializer that holds `values`, one for each kind and content, of the same name in every graph."""
    name = "_".join((kind, *map(str, values)))
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.array(values, np.int64), name=name)))
    return graph.initializers[name]


def integer(graph: ir.Graph, value: int) -> ir.Value:
    """An initializer that holds one number, as a scalar, of the same name in every graph."""
    name = f"scalar_{value}"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(value, ir.DataType.INT64, name=name)))
    return graph.initializers[name]
