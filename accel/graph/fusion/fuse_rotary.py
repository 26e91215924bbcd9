"""Fuse rotary position embeddings that are written as products, slices and a sum.

The fused node is ONNX Runtime's `RotaryEmbedding`, with kernels on CPU and CUDA:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RotaryEmbedding
Rotary position embeddings: https://arxiv.org/abs/2104.09864
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_node
from accel.graph.fusion.attention import cut_heads, joined_heads, split_rows
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import dims, integer, integers, made_by, scalar

Angles = tuple[ir.Value, ir.Value]  # cosines and sines, each [B or 1, 1, S, D] with equal halves


@dataclass
class Rotation:
    """x * cos + rotate_half(x) * sin, where rotate_half(x) is x's second half, negated, and then its first."""

    x: ir.Value  # [B, H, S, D]
    angles: Angles


class FuseRotary(GraphPass):
    """Replace each rotation by one node; its tables are half the angles, cut once.

    Where heads are cut from a projection's rows [B, S, H * D], the rows are rotated before the cut, so that an
    attention that is fused later can read them.
    """

    name = "fuse_rotary"
    description = "Fuse each rotary position embedding into one node"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        graph = model.graph
        modified = split_rows(graph)
        tables: dict[Angles, list[ir.Value]] = {}
        for node in list(graph):
            if node.op_type != "Add" or node.domain != "":
                continue
            try:
                rotation = _match(node)
            except NoMatchError as error:
                self.log_miss(node, error)
                continue
            if rotation is None:
                continue
            if rotation.angles not in tables:
                tables[rotation.angles] = _add_tables(graph, node, rotation.angles)
            _rewrite(graph, node, rotation.x, tables[rotation.angles])
            graph.opset_imports.setdefault(CONTRIB, 1)
        return remove_unused(model, modified or bool(tables))


def _rewrite(graph: ir.Graph, add: ir.Node, x: ir.Value, tables: Sequence[ir.Value]) -> None:
    """Replace the rotation of `x` that ends in `add`."""
    rows, old = joined_heads(x), add.outputs[0]
    shape = x.shape if rows is None else rows.shape
    rotated = add_node(
        graph, "RotaryEmbedding", [rows or x, *tables], domain=CONTRIB, dtype=x.dtype, shape=shape, before=add
    )
    heads = rotated if rows is None else cut_heads(graph, rotated, x, before=add)
    convenience.replace_nodes_and_values(graph, add, [add], [], [old], [heads])


def _match(add: ir.Node) -> Rotation | None:
    """Match a rotation that ends in `add`; None if it doesn't look like one.

    Raise `NoMatchError` if it is a rotation that the kernel can't compute.
    """
    for straight, crossed in permutations(add.inputs):
        products = made_by(straight, "Mul"), made_by(crossed, "Mul")
        if products[0] is None or products[1] is None:
            continue
        for x, cosines in permutations(products[0].inputs):
            for halves, sines in permutations(products[1].inputs):
                if x is None or cosines is None or sines is None or not _is_rotated_half(halves, x):
                    continue
                _check_angles(x, cosines)
                _check_angles(x, sines)
                if dims(cosines) != dims(sines):
                    raise NoMatchError(f"cosines have shape {dims(cosines)}, sines {dims(sines)}")
                return Rotation(x, (cosines, sines))
    return None


def _is_rotated_half(value: ir.Value | None, x: ir.Value) -> bool:
    """Return whether `value` is the second half of `x`, negated, and then its first."""
    shape = dims(x)
    concat = made_by(value, "Concat")
    if shape is None or concat is None or len(concat.inputs) != 2 or not isinstance(shape[-1], int):
        return False
    rank, half = len(shape), shape[-1] // 2
    negated = made_by(concat.inputs[0], "Neg")
    return (
        concat.attributes.get_int("axis", 0) % rank == rank - 1
        and negated is not None
        and _is_slice(negated.inputs[0], x, half, shape[-1])
        and _is_slice(concat.inputs[1], x, 0, half)
    )


def _is_slice(value: ir.Value | None, x: ir.Value, start: int, end: int) -> bool:
    """Return whether `value` is `x` from `start` to `end` along its last axis."""
    shape, node = dims(x), made_by(value, "Slice")
    if node is None or node.inputs[0] is not x or shape is None or len(node.inputs) < 4:
        return False
    first, last, axis = (scalar(bound) for bound in node.inputs[1:4])
    stride = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if last is None or axis is None:
        return False
    rank = len(shape)
    return first == start and min(last, int(shape[-1])) == end and int(axis) % rank == rank - 1 and stride == 1


def _check_angles(x: ir.Value, angles: ir.Value) -> None:
    """Raise `NoMatchError` unless `angles` turn all heads of `x` alike, have its width and type, and equal halves."""
    shape, wanted = dims(angles), dims(x)
    if shape is None or wanted is None or len(shape) != 4 or len(wanted) != 4:
        raise NoMatchError(f"angles of shape {shape} for queries of shape {wanted}, expected 4 axes")
    if shape[0] not in (1, wanted[0]) or shape[1:] != (1, *wanted[2:]):
        raise NoMatchError(f"angles of shape {shape} don't turn the heads of {wanted} alike")
    if angles.dtype != x.dtype:
        raise NoMatchError(f"angles are {angles.dtype}, what they turn is {x.dtype}")
    if not _has_equal_halves(angles):
        raise NoMatchError("the halves of the angles may differ")


def _has_equal_halves(angles: ir.Value) -> bool:
    """Return whether `angles` are computed elementwise from the concatenation of a value with itself."""
    value: ir.Value | None = angles
    node = made_by(value, "Unsqueeze", "Cast", "Mul", "Cos", "Sin")
    while node is not None:
        if node.op_type == "Mul" and scalar(node.inputs[1]) is None:
            return False
        value = node.inputs[0]
        node = made_by(value, "Unsqueeze", "Cast", "Mul", "Cos", "Sin")
    concat = made_by(value, "Concat")
    return concat is not None and len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]


def _add_tables(graph: ir.Graph, before: ir.Node, angles: Angles) -> list[ir.Value]:
    """Return position ids, [B, S] or [1], and the tables that they select from.

    The tables are cosines and sines, [B * S or S, D / 2]. Position ids of shape [1] hold the first token's position.
    """
    shape = dims(angles[0]) or (1, 1, 1, 2)
    width, int64 = int(shape[3]), ir.DataType.INT64
    start, end, axis = (integers(graph, "lengths", [number]) for number in (0, width // 2, 1))
    tables = []
    for each in angles:
        target = integers(graph, "shape", [-1, width])
        rows = add_node(graph, "Reshape", [each, target], dtype=each.dtype, before=before)  # [B * S or S, D]
        tables.append(add_node(graph, "Slice", [rows, start, end, axis], dtype=each.dtype, before=before))
    if shape[0] == 1:
        return [integers(graph, "lengths", [0]), *tables]
    zero, one = integer(graph, 0), integer(graph, 1)
    lengths = add_node(graph, "Shape", [angles[0]], dtype=int64, before=before)
    count = add_node(graph, "Gather", [lengths, zero], attributes={"axis": 0}, dtype=int64, before=before)
    target = integers(graph, "shape", [-1, 1])
    if shape[2] != 1:
        axis = integer(graph, 2)
        length = add_node(graph, "Gather", [lengths, axis], attributes={"axis": 0}, dtype=int64, before=before)
        count = add_node(graph, "Mul", [count, length], dtype=int64, before=before)
        axes = integers(graph, "axes", [0, 2])
        target = add_node(graph, "Gather", [lengths, axes], attributes={"axis": 0}, dtype=int64, before=before)
    rows = add_node(graph, "Range", [zero, count, one], dtype=int64, before=before)
    return [add_node(graph, "Reshape", [rows, target], dtype=int64, before=before), *tables]  # [B, S]
