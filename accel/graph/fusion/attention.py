"""What attention looks like in an exported graph: products, a softmax, and heads cut from projections."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.build import add_node
from accel.graph.passes import NoMatchError
from accel.graph.shapes import CUT_KEYS, HEADS, KEYS, Dims, dims, integers, made_by, permutation, scalar, used_once


@dataclass
class Attention:
    """softmax(scale * query keyᵀ + bias) value, and the node whose output is the heads side by side, [B, S, H * K]."""

    query: ir.Value  # [B, H, S, K]
    key: ir.Value  # [B, H, T, K]
    value: ir.Value  # [B, H, T, K]
    bias: ir.Value | None  # [B or 1, H or 1, S or 1, T]
    scale: float
    last: ir.Node


@dataclass
class Scores:
    """scale * product + bias."""

    product: ir.Node
    bias: ir.Value | None
    scale: float


def match(softmax: ir.Node) -> Attention:
    """Match the attention around a softmax; raise `NoMatchError` if there is none that the kernel computes."""
    shape = dims(softmax.outputs[0])
    if shape is None or len(shape) != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NoMatchError(f"the softmax has shape {shape}, expected 4 axes and axis=-1")
    weighted = _only_reader(softmax.outputs[0], "MatMul")
    transpose = _only_reader(weighted.outputs[0], "Transpose")
    last = _only_reader(transpose.outputs[0], "Reshape")
    joined = dims(last.outputs[0])
    if weighted.inputs[0] is not softmax.outputs[0]:
        raise NoMatchError("the probabilities are the second factor")
    if permutation(transpose) != HEADS or joined is None or len(joined) != 3 or not isinstance(joined[2], int):
        raise NoMatchError(f"heads are joined by axes {permutation(transpose)} into shape {joined}")
    value = weighted.inputs[1]
    for scores in _scores(softmax.inputs[0], shape):
        query, key = scores.product.inputs[0], _keys(scores.product.inputs[1])
        if query is not None and key is not None and value is not None and _heads_agree(query, key, value):
            return Attention(query, key, value, scores.bias, scores.scale, last)
    raise NoMatchError("its input is not a scaled product of queries and keys of equal heads, plus a bias")


def _keys(factor: ir.Value | None) -> ir.Value | None:
    """Return the keys [B, H, T, K] that `factor` [B, H, K, T] turns around; None if there are none.

    Where one `Transpose` cuts heads and turns them around, the keys are the output of a new one, which only cuts them.
    Nothing reads it if the attention isn't fused, so that `remove_unused` removes it.
    """
    transpose = made_by(factor, "Transpose")
    graph = transpose.graph if transpose is not None else None
    if transpose is None or not isinstance(graph, ir.Graph):
        return None
    if permutation(transpose) == KEYS:
        return transpose.inputs[0]
    cut, turned = transpose.inputs[0], dims(factor)
    if permutation(transpose) != CUT_KEYS or cut is None or turned is None:
        return None
    shape = ir.Shape([turned[axis] for axis in KEYS])
    attributes = {"perm": HEADS}
    return add_node(graph, "Transpose", [cut], attributes=attributes, dtype=cut.dtype, shape=shape, before=transpose)


def _scores(value: ir.Value | None, shape: Dims) -> Iterator[Scores]:
    """Yield the readings of `value` as scores of `shape`: with either addend as the bias, or without one."""
    add = made_by(value, "Add")
    readings = [(value, None)] if add is None else [tuple(add.inputs), tuple(reversed(add.inputs))]
    for scores, bias in readings:
        if bias is not None and not _is_bias(dims(bias), shape):
            continue
        scale = 1.0
        scaled = made_by(scores, "Mul", "Div")
        factor = scalar(scaled.inputs[1]) if scaled is not None else None
        if scaled is not None and factor:
            scores = scaled.inputs[0]
            scale = factor if scaled.op_type == "Mul" else 1 / factor
        product = made_by(scores, "MatMul")
        if product is not None and used_once(product.outputs[0]) and dims(scores) == shape:
            yield Scores(product, bias, scale)


def _is_bias(bias: Dims | None, shape: Dims) -> bool:
    """Return whether a bias has one number for each key, be it the same for several sequences, heads or queries."""
    if bias is None or len(bias) != 4 or bias[3] != shape[3]:
        return False
    return all(length in (1, scores) for length, scores in zip(bias[:3], shape[:3], strict=True))


def _heads_agree(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    """Return whether all three, [B, H, S or T, K], have as many heads of one width."""
    shapes = [dims(each) for each in (query, key, value)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    return len({(shape[1], shape[3]) for shape in shapes if shape is not None}) == 1


def check_one_precision(attention: Attention) -> None:
    """Raise `NoMatchError` if parts of the attention differ in their type."""
    values = [attention.query, attention.key, attention.value, attention.bias]
    values += [attention.last.inputs[0], attention.last.outputs[0]]
    dtypes = {value.dtype for value in values if value is not None}
    if len(dtypes) != 1:
        raise NoMatchError(f"its values have several types: {', '.join(sorted(map(str, dtypes)))}")


def unrepeated(value: ir.Value | None, what: str) -> ir.Value:
    """Return the [B, G, T, D] of which `value` [B, H, T, D] repeats each head; else raise `NoMatchError`."""
    reshape = made_by(value, "Reshape")
    expand = made_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    source = unsqueeze.inputs[0] if unsqueeze is not None else None
    shape, repeated = dims(source), dims(value)
    if unsqueeze is None or source is None or shape is None or repeated is None:
        raise NoMatchError(f"the {what} are not repeated by Unsqueeze, Expand and Reshape")
    if len(shape) != 4 or len(repeated) != 4 or scalar(unsqueeze.inputs[1]) != 2:
        raise NoMatchError(f"{what} of shape {shape} are repeated into {repeated}, expected 4 axes")
    groups, heads = shape[1], repeated[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        raise NoMatchError(f"{heads} heads are not a multiple of {groups} groups")
    if (shape[0], *shape[2:]) != (repeated[0], *repeated[2:]):
        raise NoMatchError(f"{what} of shape {shape} are repeated into {repeated}")
    return source


def split_rows(graph: ir.Graph) -> bool:
    """Replace each `Split` of heads by one of the rows that they are cut from, and cut its parts into heads.

    The heads of queries, keys and values that one product computes are then cut from values [B, S, H * K] of their own,
    which the operators for attention and rotary embeddings read.

    Returns:
        Whether any was replaced.
    """
    modified = False
    for split in [node for node in graph if node.op_type == "Split" and node.domain == ""]:
        rows = joined_heads(split.inputs[0]) if split.attributes.get_int("axis", 0) == 1 else None
        shapes = [dims(output) for output in split.outputs]
        if rows is None or any(shape is None or not isinstance(shape[1], int) for shape in shapes):
            continue
        widths = [int(shape[1]) * int(shape[3]) for shape in shapes if shape is not None]
        lead = rows.shape[:2] if rows.shape is not None else (None, None)
        parts = [ir.Value(type=rows.type, shape=ir.Shape([*lead, width])) for width in widths]
        sizes = integers(graph, "split", widths)
        graph.insert_before(split, ir.node("Split", [rows, sizes], attributes={"axis": -1}, outputs=parts))
        for part, output in zip(parts, split.outputs, strict=True):
            cut = cut_heads(graph, part, output, before=split)
            cut.name = output.name
            convenience.replace_all_uses_with(output, cut, replace_graph_outputs=True)
        graph.remove(split, safe=True)
        modified = True
    return modified


def cut_heads(graph: ir.Graph, rows: ir.Value, heads: ir.Value, before: ir.Node) -> ir.Value:
    """Insert a `Reshape` and a `Transpose` that cut `rows` [B, S, H * K] into the shape of `heads`, [B, H, S, K]."""
    batch, count, length, width = dims(heads) or (0, 0, 0, 0)
    target, shape = integers(graph, "shape", [0, 0, int(count), int(width)]), ir.Shape([batch, length, count, width])
    cut = add_node(graph, "Reshape", [rows, target], dtype=rows.dtype, shape=shape, before=before)
    return add_node(
        graph, "Transpose", [cut], attributes={"perm": HEADS}, dtype=rows.dtype, shape=heads.shape, before=before
    )


def joined_heads(value: ir.Value | None) -> ir.Value | None:
    """Return the [B, S, H * K] that `value` [B, H, S, K] was cut from; None if from none. See `split_rows`."""
    transpose = made_by(value, "Transpose")
    if transpose is None or permutation(transpose) != HEADS:
        return None
    reshape = made_by(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    source, cut = dims(reshape.inputs[0]), dims(reshape.outputs[0])  # [B, S, H * K], [B, S, H, K]
    if source is None or cut is None or len(source) != 3 or source[:2] != cut[:2]:
        return None
    return reshape.inputs[0]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node:
    """Return the one node that reads `value`; raise `NoMatchError` unless it is an `op_type`."""
    readers = [f"{node.op_type}" for node in value.consumers()]
    node = next(iter(value.consumers())) if used_once(value) else None
    if node is None or node.op_type != op_type or node.domain != "":
        raise NoMatchError(f"{value.name} is read by {', '.join(readers) or 'no node'}, expected one {op_type}")
    return node
