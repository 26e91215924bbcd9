"""Pack products of one value with several weights into one product with the weights side by side.

Queries, keys and values are the usual case: three products of the same input, each cut into heads. One matrix product
is read from memory as fast as three, and costs one launch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import HEADS, dims, integers, is_vector, permutation, used_once
from accel.graph.weights import set_origin, tensor_content


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
    """A product [B, T, H * K] cut into heads: its `Reshape`, and the `Transpose` nodes that read that."""

    reshape: ir.Node
    transposes: list[ir.Node]
    count: int
    width: int


@dataclass
class Pack:
    """Products of one input to pack in one graph; `biased`: with a bias, which may be zero for some."""

    products: Sequence[Product]
    biased: bool


class PackQkv(GraphPass):
    """Pack weights that every graph multiplies with one common input, and uses for nothing else.

    So all graphs keep holding equal bytes, and what one graph alone computes stays apart, such as the keys and values
    of the encoder's output. Done only where it leaves fewer nodes, and for weights of one width: a `Split` into equal
    parts is one kernel on CUDA, and of different ones also four copies from the host (ONNX Runtime 1.31).
    """

    name = "pack_qkv"
    description = "Pack queries, keys and values into one product"

    def prepare(self, models: Sequence[ir.Model]) -> None:
        """Choose the products to pack, by model."""
        self._packs: dict[int, list[Pack]] = {id(model): [] for model in models}
        products = [{product.weight.name or "": product for product in _products(model.graph)} for model in models]
        for names in _names_by_input(products):
            rows = [[by_weight[name] for name in names] for by_weight in products]
            if len(names) < 2:
                continue
            biased = any(product.bias is not None for product in rows[0])
            reason = _reason_against(rows, biased)
            if reason is not None:
                self.log_miss(rows[0][0].node, reason)
                continue
            for model, row in zip(models, rows, strict=True):
                self._packs[id(model)].append(Pack(row, biased))

    def call(self, model: ir.Model) -> PassResult:
        """Pack the products that `prepare` chose."""
        packs = self._packs[id(model)]
        for pack in packs:
            _pack(model.graph, pack)
        return remove_unused(model, modified=bool(packs))


def _names_by_input(products: Sequence[dict[str, "Product"]]) -> list[list[str]]:
    """Return names of weights that every graph multiplies with one common input, and that are of one width.

    Args:
        products: For each graph, name of a weight -> the product with it.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for name in products[0] if products else ():
        if all(name in by_weight for by_weight in products):
            inputs = [id(by_weight[name].x) for by_weight in products]
            names.setdefault((_width(products[0][name].weight), *inputs), []).append(name)
    return list(names.values())


def _reason_against(rows: Sequence[Sequence["Product"]], biased: bool) -> str | None:
    """Return why products aren't packed; None if they are. `rows`: for each graph, the products."""
    names = [product.weight.name for product in rows[0]]
    if not _agree(rows):
        return f"{names} or their biases differ between the graphs, or in their rows"
    if not all(_saves(row, biased) for row in rows):
        return f"packing {names} leaves no fewer nodes"
    return None


def _products(graph: ir.Graph) -> Iterator[Product]:
    """Yield the products with a weight of two axes, each with its bias."""
    for node in graph:
        if node.op_type != "MatMul" or node.domain != "":
            continue
        x, weight = node.inputs
        if x is None or weight is None or not _is_weight(weight, 2):
            continue
        bias = _bias_behind(node, weight)
        last = node if bias is None else next(iter(node.outputs[0].consumers()))
        yield Product(x, weight, bias, node, last)


def _bias_behind(product: ir.Node, weight: ir.Value) -> ir.Value | None:
    """Return the vector of the weight's width that the only reader of a product adds to it."""
    output = product.outputs[0]
    reader = next(iter(output.consumers())) if used_once(output) else None
    if reader is None or reader.op_type != "Add" or reader.domain != "" or reader.graph is not product.graph:
        return None
    addend = next((value for value in reader.inputs if value is not output), None)
    width = (dims(weight) or (0, 0))[1]
    return addend if addend is not None and _is_weight(addend, 1) and is_vector(addend, width) else None


def _is_weight(value: ir.Value, rank: int) -> bool:
    """Return whether `value` is a float32 initializer of `rank` axes that one node reads."""
    tensor = value.const_value
    is_float = value.is_initializer() and tensor is not None and tensor.dtype == FLOAT
    return is_float and len(value.shape or ()) == rank and used_once(value)


def _agree(rows: Sequence[Sequence[Product]]) -> bool:
    """Return whether the graphs hold the same weights, all of as many rows, and the same biases if any."""
    first = rows[0]
    for row in rows:
        for product, expected in zip(row, first, strict=True):
            bias = product.bias.name if product.bias is not None else None
            expected_bias = expected.bias.name if expected.bias is not None else None
            if product.weight.shape != expected.weight.shape or bias != expected_bias:
                return False
    return len({product.weight.shape[0] for product in first if product.weight.shape is not None}) == 1


def _saves(row: Sequence[Product], biased: bool) -> bool:
    """Return whether the packed form has fewer nodes than the products apart."""
    heads = _all_heads(row)
    nodes = sum(1 + (product.bias is not None) for product in row)
    if heads is None:
        return nodes > 2 + biased
    nodes += sum(1 + len(each.transposes) for each in heads)
    other_transposes = sum(permutation(node) != HEADS for each in heads for node in each.transposes)
    return nodes > 4 + biased + other_transposes


def _all_heads(row: Sequence[Product]) -> list[Heads] | None:
    """Return how each product is cut into heads, if all are, into heads of one width."""
    found = [_heads(product.last.outputs[0]) for product in row]
    heads = [each for each in found if each is not None]
    return heads if len(heads) == len(found) and len({each.width for each in heads}) == 1 else None


def _heads(value: ir.Value) -> Heads | None:
    """Return how `value` [B, T, H * K] is cut into heads, and transposed; None if it isn't."""
    readers = value.consumers()
    if not used_once(value) or readers[0].op_type != "Reshape" or readers[0].graph is not value.graph:
        return None
    reshape = readers[0]
    target = reshape.inputs[1].const_value if reshape.inputs[1] is not None else None
    transposes = list(reshape.outputs[0].consumers())
    if target is None or reshape.attributes.get_int("allowzero", 0) == 1 or reshape.outputs[0].is_graph_output():
        return None
    if any(node.op_type != "Transpose" or node.graph is not value.graph for node in transposes):
        return None
    orders = [permutation(node) for node in transposes]
    lengths = target.numpy().tolist()
    if len(lengths) != len(HEADS) or lengths[:2] != [0, 0] or min(lengths[2:]) <= 0 or len(dims(value) or ()) != 3:
        return None
    if not transposes or () in orders or orders.count(HEADS) > 1:
        return None
    return Heads(reshape, transposes, lengths[2], lengths[3])


def _pack(graph: ir.Graph, pack: Pack) -> None:
    """Replace products, and what cuts them into heads, by one product and one `Split`."""
    row = pack.products
    heads = _all_heads(row)
    packed = _add_product(graph, row, pack.biased)
    old_nodes = [node for product in row for node in {product.last, product.node}]
    if heads is None:
        outputs = [product.last.outputs[0] for product in row]
        _add_split(graph, row[0].node, packed, -1, [_width(product.weight) for product in row], outputs)
    else:
        _split_heads(graph, row[0].node, packed, heads)
        for each in heads:
            old_nodes += [each.reshape, *each.transposes]
    graph.remove(old_nodes, safe=True)
    for product in row:
        for value in (product.weight, product.bias):
            if value is not None:
                graph.initializers.pop(value.name or "")


def _add_product(graph: ir.Graph, row: Sequence[Product], biased: bool) -> ir.Value:
    """Insert one product before the first of the row, and its bias: zero for those that had none."""
    first = row[0].node
    output = first.outputs[0]
    weight = _concatenated(graph, [product.weight for product in row])
    width = sum(_width(product.weight) for product in row)
    shape = ir.Shape([*output.shape[:-1], width]) if output.shape is not None else None
    name, dtype = f"{output.name}.joined", row[0].x.dtype
    packed = add_node(graph, "MatMul", [row[0].x, weight], name, dtype=dtype, shape=shape, before=first)
    if not biased:
        return packed
    parts = [product.bias if product.bias is not None else _width(product.weight) for product in row]
    bias, name = _concatenated(graph, parts), f"{output.name}.biased"
    return add_node(graph, "Add", [packed, bias], name, dtype=dtype, shape=shape, before=first)


def _split_heads(graph: ir.Graph, before: ir.Node, packed: ir.Value, heads: Sequence[Heads]) -> None:
    """[B, T, sum of H * K] -> [B, sum of H, T, K] -> a part [B, H, T, K] for each product."""
    count, width = sum(each.count for each in heads), heads[0].width
    batch, tokens = packed.shape[:2] if packed.shape is not None else (None, None)
    dtype, target = packed.dtype, integers(graph, "shape", (0, 0, count, width))
    shape = ir.Shape([batch, tokens, count, width])
    cut = add_node(graph, "Reshape", [packed, target], f"{packed.name}.heads", dtype=dtype, shape=shape, before=before)
    transposed = add_node(
        graph,
        "Transpose",
        [cut],
        f"{packed.name}.turned",
        attributes={"perm": HEADS},
        dtype=dtype,
        shape=ir.Shape([batch, count, tokens, width]),
        before=before,
    )
    outputs = []
    for each in heads:
        same = next((node.outputs[0] for node in each.transposes if permutation(node) == HEADS), None)
        name, shape = f"{each.reshape.outputs[0].name}.part", ir.Shape([batch, each.count, tokens, width])
        outputs.append(same if same is not None else ir.Value(name=name, type=packed.type, shape=shape))
    parts = _add_split(graph, before, transposed, 1, [each.count for each in heads], outputs)
    for each, part in zip(heads, parts, strict=True):
        for node in each.transposes:
            if permutation(node) != HEADS:
                old = node.outputs[0]
                order = [HEADS.index(axis) for axis in permutation(node)]
                new = add_node(
                    graph,
                    "Transpose",
                    [part],
                    old.name,
                    attributes={"perm": order},
                    dtype=dtype,
                    shape=old.shape,
                    before=before,
                )
                convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _add_split(
    graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int, sizes: Sequence[int], old_values: Sequence[ir.Value]
) -> list[ir.Value]:
    """Insert a `Split` whose outputs take the names and the readers of `old_values`, and return them."""
    lengths = integers(graph, "split", sizes)
    parts = [ir.Value(name=old.name, type=value.type, shape=old.shape) for old in old_values]
    node = ir.node("Split", [value, lengths], attributes={"axis": axis}, outputs=parts, name=f"{value.name}.split")
    graph.insert_before(before, node)
    convenience.replace_all_uses_with(list(old_values), parts, replace_graph_outputs=True)
    return parts


def _width(weight: ir.Value) -> int:
    """Return the length of a weight's last axis."""
    return int(weight.const_value.shape.numpy()[-1]) if weight.const_value is not None else 0


def _concatenated(graph: ir.Graph, parts: Sequence[ir.Value | int]) -> ir.Value:
    """Register one weight made of several along the last axis, read only when it is saved. A number: so many zeros."""
    tensors = [part.const_value if isinstance(part, ir.Value) else part for part in parts]
    lead = next(tensor.shape.numpy()[:-1] for tensor in tensors if isinstance(tensor, ir.TensorProtocol))
    name = _common_name([part.name or "" for part in parts if isinstance(part, ir.Value)])
    width = sum(part if isinstance(part, int) else _width(part) for part in parts)
    shape = ir.Shape([*lead, width])

    def read() -> ir.TensorProtocol:
        columns = [
            tensor_content(tensor) if isinstance(tensor, ir.TensorProtocol) else np.zeros(tensor or 0, np.float32)
            for tensor in tensors
        ]
        return ir.tensor(np.concatenate(columns, axis=-1), name=name)

    lazy = ir.LazyTensor(read, dtype=FLOAT, shape=shape, name=name)
    set_origin(lazy, "concatenate", tensors)
    value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=shape, const_value=lazy)
    graph.register_initializer(value)
    return value


def _common_name(names: Sequence[str]) -> str:
    """Return one name: block.q.weight, block.k.weight, block.v.weight -> block.q+k+v.weight."""
    if len(names) == 1:
        return f"{names[0]}+0"
    start = _common_start(names)
    end = _common_start([name[len(start) :][::-1] for name in names])[::-1]
    return start + "+".join(name[len(start) : len(name) - len(end)] for name in names) + end


def _common_start(names: Sequence[str]) -> str:
    """Return the longest common prefix."""
    letters = zip(*names, strict=False)  # up to the shortest name
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, letters))
