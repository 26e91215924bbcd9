"""Rotary positions, written as products, slices and a sum, become one node.

The node is ONNX Runtime's `RotaryEmbedding`, with kernels on CPU and CUDA:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RotaryEmbedding
Rotary positions: https://arxiv.org/abs/2104.09864
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, integer, integers, made_by, scalar

DOMAIN = "com.microsoft"
Pair = tuple[ir.Value, ir.Value]  # cosines and sines of angles


@dataclass
class Rotation:
    """x cos + (-x's second half, x's first half) sin: a pair of elements half a width apart is turned by an angle."""

    x: ir.Value  # [B, H, 1, D]
    angles: Pair  # each [B or 1, 1, 1, D], its halves alike
    last: ir.Node


def fuse_rotary(decode: ir.Model) -> None:
    """In place, in a graph of one token: the angles are cut in half once, and each rotation is one node."""
    graph = decode.graph
    tables: dict[Pair, list[ir.Value]] = {}
    for node in list(graph):
        found = next(_rotations(node), None) if node.op_type == "Add" and node.domain == "" else None
        if found is None:
            continue
        if found.angles not in tables:
            tables[found.angles] = _tables(graph, node, found.angles)
        old = node.outputs[0]
        made = ir.Value(name=old.name, type=old.type, shape=old.shape)
        turned = ir.node("RotaryEmbedding", [found.x, *tables[found.angles]], domain=DOMAIN, outputs=[made])
        graph.insert_before(node, turned)
        convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.opset_imports.setdefault(DOMAIN, 1)
    RemoveUnusedNodesPass()(decode)


def _rotations(add: ir.Node) -> Iterator[Rotation]:
    for straight, crossed in permutations(add.inputs):
        products = made_by(straight, "Mul"), made_by(crossed, "Mul")
        if products[0] is None or products[1] is None:
            continue
        for x, cosines in permutations(products[0].inputs):
            for halves, sines in permutations(products[1].inputs):
                if x is None or cosines is None or sines is None or not _swapped(halves, x):
                    continue
                if _fits(x, cosines) and _fits(x, sines) and dims(cosines) == dims(sines):
                    yield Rotation(x, (cosines, sines), add)


def _swapped(halves: ir.Value | None, x: ir.Value) -> bool:
    """Whether `halves` is the second half of `x`, negated, and then its first."""
    shape = dims(x)
    joined = made_by(halves, "Concat")
    if shape is None or joined is None or len(joined.inputs) != 2 or not isinstance(shape[-1], int):
        return False
    rank, half = len(shape), shape[-1] // 2
    negated = made_by(joined.inputs[0], "Neg")
    return (
        joined.attributes.get_int("axis", 0) % rank == rank - 1
        and negated is not None
        and _slice(negated.inputs[0], x, half, shape[-1])
        and _slice(joined.inputs[1], x, 0, half)
    )


def _slice(value: ir.Value | None, x: ir.Value, start: int, end: int) -> bool:
    """Whether `value` is `x` from `start` to `end` along its last axis."""
    shape, node = dims(x), made_by(value, "Slice")
    if node is None or node.inputs[0] is not x or shape is None or len(node.inputs) < 4:
        return False
    first, last, axis, stride = ([scalar(one) for one in node.inputs[1:]] + [1.0])[:4]
    return (
        first == start
        and last is not None
        and min(last, int(shape[-1])) == end
        and axis is not None
        and int(axis) % len(shape) == len(shape) - 1
        and stride == 1
    )


def _fits(x: ir.Value, angles: ir.Value) -> bool:
    """Whether `angles` are one token's, of the width and type of `x`, and both halves of them alike."""
    own, wide = dims(angles), dims(x)
    if own is None or wide is None or len(own) != 4 or len(wide) != 4 or angles.dtype != x.dtype:
        return False
    return wide[2] == 1 and own[1:3] == (1, 1) and own[0] in (1, wide[0]) and own[3] == wide[3] and _alike(angles)


def _alike(angles: ir.Value) -> bool:
    value: ir.Value | None = angles
    while (node := made_by(value, "Unsqueeze", "Cast", "Mul", "Cos", "Sin")) is not None:
        if node.op_type == "Mul" and scalar(node.inputs[1]) is None:
            return False
        value = node.inputs[0]
    joined = made_by(value, "Concat")
    return joined is not None and len(joined.inputs) == 2 and joined.inputs[0] is joined.inputs[1]


def _tables(graph: ir.Graph, before: ir.Node, angles: Pair) -> list[ir.Value]:
    """Rows of the tables, [B, 1] or [1], and the tables: cosines and sines, [B or 1, D / 2]."""
    shape = dims(angles[0]) or (1, 1, 1, 2)
    width = int(shape[3])

    def node(op: str, inputs: Sequence[ir.Value | None], kind: ir.DataType, **attributes: int) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes)
        made.outputs[0].type = ir.TensorType(kind)
        graph.insert_before(before, made)
        return made.outputs[0]

    ends = [integers(graph, "lengths", [number]) for number in (0, width // 2, 1)]
    halves = []
    for one in angles:
        kind = one.dtype or ir.DataType.FLOAT
        rows = node("Reshape", [one, integers(graph, "shape", [-1, width])], kind)
        halves.append(node("Slice", [rows, *ends], kind))
    if shape[0] == 1:
        return [integers(graph, "lengths", [0]), *halves]
    lengths = node("Shape", [angles[0]], ir.DataType.INT64)
    batch = node("Gather", [lengths, integer(graph, 0)], ir.DataType.INT64, axis=0)
    count = node("Range", [integer(graph, 0), batch, integer(graph, 1)], ir.DataType.INT64)
    return [node("Reshape", [count, integers(graph, "shape", [-1, 1])], ir.DataType.INT64), *halves]
