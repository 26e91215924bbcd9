"""Products of one value with several weights become one product with the weights side by side.

Queries, keys and values are the usual case: three products of the same input, each cut into heads. One matrix product
is read from memory as fast as three, and costs one launch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import HEADS, dims, integers, is_vector, order, used_once


@dataclass
class Product:
    """x times a weight, plus a bias where there is one. `last` is the node that gives the result."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    node: ir.Node
    last: ir.Node


@dataclass
class Heads:
    """A product cut into heads: its `Reshape`, the `Transpose` nodes that read that, heads and their width."""

    reshape: ir.Node
    turns: list[ir.Node]
    count: int
    width: int


def pack_qkv(models: Sequence[ir.Model]) -> None:
    """In place: joined are weights that every graph multiplies with one common input, and uses for nothing else.

    So all graphs keep holding equal bytes, and what one graph alone computes stays apart, such as the keys and values
    of the encoder's output. Done only where it leaves fewer nodes, and for weights of one width: a `Split` into equal
    parts is one kernel on CUDA, and of different ones also four copies from the host (ONNX Runtime 1.31).
    """
    products = [{found.weight.name or "": found for found in _products(model.graph)} for model in models]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in products[0] if products else ():
        if all(name in known for known in products):
            width = _width(products[0][name].weight)
            groups.setdefault((width, *(id(known[name].x) for known in products)), []).append(name)
    for names in groups.values():
        rows = [[known[name] for name in names] for known in products]
        if len(names) > 1 and _agree(rows):
            biased = any(product.bias is not None for product in rows[0])
            if all(_saves(row, biased) for row in rows):
                for model, row in zip(models, rows, strict=True):
                    _join(model.graph, row, biased)
    for model in models:
        RemoveUnusedNodesPass()(model)


def _products(graph: ir.Graph) -> Iterator[Product]:
    for node in graph:
        if node.op_type != "MatMul" or node.domain != "":
            continue
        x, weight = node.inputs
        if x is None or weight is None or not _is_weight(weight, 2):
            continue
        width = (dims(weight) or (0, 0))[1]
        user = next(iter(node.outputs[0].consumers())) if used_once(node.outputs[0]) else None
        bias, last = None, node
        if user is not None and user.op_type == "Add" and user.domain == "" and user.graph is graph:
            other = next((value for value in user.inputs if value is not node.outputs[0]), None)
            if other is not None and _is_weight(other, 1) and is_vector(other, width):
                bias, last = other, user
        yield Product(x, weight, bias, node, last)


def _is_weight(value: ir.Value, rank: int) -> bool:
    tensor = value.const_value
    known = value.is_initializer() and tensor is not None and tensor.dtype == FLOAT
    return known and len(value.shape or ()) == rank and used_once(value)


def _agree(rows: Sequence[Sequence[Product]]) -> bool:
    """Whether the graphs hold the same weights, and the same biases if any."""
    first = rows[0]
    for row in rows:
        for own, other in zip(row, first, strict=True):
            biases = (own.bias.name if own.bias else None, other.bias.name if other.bias else None)
            if own.weight.shape != other.weight.shape or biases[0] != biases[1]:
                return False
    return len({product.weight.shape[0] for product in first if product.weight.shape is not None}) == 1


def _saves(row: Sequence[Product], biased: bool) -> bool:
    """Whether the joined form has fewer nodes than the products apart."""
    heads = _all_heads(row)
    now = sum(1 + (product.bias is not None) for product in row)
    if heads is None:
        return now > 2 + biased
    turned = sum(order(turn) != HEADS for found in heads for turn in found.turns)
    return now + sum(1 + len(found.turns) for found in heads) > 4 + biased + turned


def _all_heads(row: Sequence[Product]) -> list[Heads] | None:
    """How each product is cut into heads, if all are, into heads of one width."""
    found = [_heads(product.last.outputs[0]) for product in row]
    known = [heads for heads in found if heads is not None]
    return known if len(known) == len(found) and len({heads.width for heads in known}) == 1 else None


def _heads(value: ir.Value) -> Heads | None:
    users = value.consumers()
    if not used_once(value) or users[0].op_type != "Reshape" or users[0].graph is not value.graph:
        return None
    reshape = users[0]
    target = reshape.inputs[1].const_value if reshape.inputs[1] is not None else None
    turns = list(reshape.outputs[0].consumers())
    if target is None or reshape.attributes.get_int("allowzero", 0) == 1 or reshape.outputs[0].is_graph_output():
        return None
    if any(turn.op_type != "Transpose" or turn.graph is not value.graph for turn in turns):
        return None
    orders = [order(turn) for turn in turns]
    lengths = target.numpy().tolist()
    if len(lengths) != len(HEADS) or lengths[:2] != [0, 0] or min(lengths[2:]) <= 0 or len(dims(value) or ()) != 3:
        return None
    if not turns or () in orders or orders.count(HEADS) > 1:
        return None
    return Heads(reshape, turns, lengths[2], lengths[3])


def _join(graph: ir.Graph, row: Sequence[Product], biased: bool) -> None:
    heads = _all_heads(row)
    made = _append_product(graph, row, biased)
    if heads is None:
        parts = [product.last.outputs[0] for product in row]
        _split(graph, row[0].node, made, -1, [_width(product.weight) for product in row], parts)
    else:
        _split_heads(graph, row[0].node, made, heads)
    gone = [node for product in row for node in {product.last, product.node}]
    for found in heads or ():
        gone += [found.reshape, *found.turns]
    graph.remove(gone, safe=True)
    for product in row:
        for value in (product.weight, product.bias):
            if value is not None:
                graph.initializers.pop(value.name or "")


def _append_product(graph: ir.Graph, row: Sequence[Product], biased: bool) -> ir.Value:
    """One product before the first of the row, and its bias: zero for those that had none."""
    weight = _side_by_side(graph, [product.weight for product in row])
    width = sum(_width(product.weight) for product in row)
    like = row[0].node.outputs[0]
    shape = ir.Shape([*like.shape[:-1], width]) if like.shape is not None else None
    made = _value(graph, row[0].node, "MatMul", [row[0].x, weight], f"{like.name}.joined", shape)
    if biased:
        parts = [product.bias if product.bias is not None else _width(product.weight) for product in row]
        made = _value(graph, row[0].node, "Add", [made, _side_by_side(graph, parts)], f"{like.name}.biased", shape)
    return made


def _split_heads(graph: ir.Graph, before: ir.Node, made: ir.Value, heads: Sequence[Heads]) -> None:
    """[B, T, sum of H * K] -> [B, sum of H, T, K] -> a part [B, H, T, K] for each product."""
    total, width = sum(found.count for found in heads), heads[0].width
    lead = made.shape[:2] if made.shape is not None else (None, None)
    target = integers(graph, "shape", (0, 0, total, width))
    cut_shape, turned_shape = ir.Shape([*lead, total, width]), ir.Shape([lead[0], total, lead[1], width])
    cut = _value(graph, before, "Reshape", [made, target], f"{made.name}.heads", cut_shape)
    turned = _value(graph, before, "Transpose", [cut], f"{made.name}.turned", turned_shape, perm=HEADS)
    parts = []
    for found in heads:
        straight = next((turn for turn in found.turns if order(turn) == HEADS), None)
        shape = ir.Shape([lead[0], found.count, lead[1], width])
        name = f"{found.reshape.outputs[0].name}.part"
        parts.append(straight.outputs[0] if straight else ir.Value(name=name, type=made.type, shape=shape))
    for found, part in zip(heads, _split(graph, before, turned, 1, [h.count for h in heads], parts), strict=True):
        for turn in found.turns:
            if order(turn) != HEADS:
                old, again = turn.outputs[0], [HEADS.index(axis) for axis in order(turn)]
                new = _value(graph, before, "Transpose", [part], old.name or "", old.shape, perm=again)
                convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _split(
    graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int, sizes: Sequence[int], olds: Sequence[ir.Value]
) -> list[ir.Value]:
    """`Split` into parts that take the names and the users of `olds`."""
    lengths = integers(graph, "split", sizes)
    parts = [ir.Value(name=old.name, type=value.type, shape=old.shape) for old in olds]
    node = ir.node("Split", [value, lengths], attributes={"axis": axis}, outputs=parts, name=f"{value.name}.split")
    graph.insert_before(before, node)
    convenience.replace_all_uses_with(list(olds), parts, replace_graph_outputs=True)
    return parts


def _value(
    graph: ir.Graph,
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value],
    name: str,
    shape: ir.Shape | None,
    **attributes: Sequence[int],
) -> ir.Value:
    made = ir.Value(name=name, type=inputs[0].type, shape=shape)
    graph.insert_before(before, ir.node(op, inputs, attributes=attributes, outputs=[made], name=name))
    return made


def _width(weight: ir.Value) -> int:
    return int(weight.const_value.shape.numpy()[-1]) if weight.const_value is not None else 0


def _side_by_side(graph: ir.Graph, parts: Sequence[ir.Value | int]) -> ir.Value:
    """One weight made of several, read only when it is written. A number stands for so many zeros."""
    tensors = [part.const_value if isinstance(part, ir.Value) else part for part in parts]
    known = [tensor for tensor in tensors if isinstance(tensor, ir.TensorProtocol)]
    name = _common_name([part.name or "" for part in parts if isinstance(part, ir.Value)])
    width = sum(part if isinstance(part, int) else _width(part) for part in parts)
    shape = ir.Shape([*known[0].shape.numpy()[:-1], width])

    def read() -> ir.TensorProtocol:
        columns = [
            tensor.numpy() if isinstance(tensor, ir.TensorProtocol) else np.zeros(tensor or 0, np.float32)
            for tensor in tensors
        ]
        return ir.tensor(np.concatenate(columns, axis=-1), name=name)

    lazy = ir.LazyTensor(read, dtype=FLOAT, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=shape, const_value=lazy)
    graph.register_initializer(value)
    return value


def _common_name(names: Sequence[str]) -> str:
    """block.q.weight, block.k.weight, block.v.weight -> block.q+k+v.weight"""
    if len(names) == 1:
        return f"{names[0]}+0"
    start = _common_start(names)
    end = _common_start([name[len(start) :][::-1] for name in names])[::-1]
    return start + "+".join(name[len(start) : len(name) - len(end)] for name in names) + end


def _common_start(names: Sequence[str]) -> str:
    places = zip(*names, strict=False)  # as far as the shortest goes
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, places))
