"""Search for the weights that matrix products read, and for whatever else reads them."""

from dataclasses import dataclass, field

import onnx_ir as ir

from accel.graph.build import CONTRIB
from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import permutation

SMALLEST = 16  # input features: with fewer, no format has a whole block


@dataclass(frozen=True)
class Product:
    """A node that multiplies an activation with a weight.

    Attributes:
        node: `MatMul`, `Gemm` or `FusedMatMul`.
        bias: The bias that a `Gemm` adds, an initializer of one axis; None without one.
    """

    node: ir.Node
    bias: ir.Value | None = None


@dataclass
class ProductWeight:
    """A matrix that products read.

    Attributes:
        value: The initializer.
        transposed: It is stored as [out, in], not [in, out].
        products: Products with it.
        lookups: `Gather` nodes that read its rows: those of a tied embedding, or of one without products in this graph.
        obstacle: Why it can't be quantized; empty if it can.
    """

    value: ir.Value
    transposed: bool = False
    products: list[Product] = field(default_factory=list)
    lookups: list[ir.Node] = field(default_factory=list)
    obstacle: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Input and output features."""
        rows, columns = (int(length) for length in self.value.const_value.shape.numpy())  # type: ignore[union-attr]
        return (columns, rows) if self.transposed else (rows, columns)


def find_weights(model: ir.Model) -> dict[str, ProductWeight]:
    """Return the FP32 matrices that products or lookups of the main graph read, by name.

    Those that nothing but lookups read are among them, because another graph of the model may multiply with them.
    """
    weights = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != FLOAT or len(tensor.shape) != 2:
            continue
        weight = _read(value, model.graph)
        if weight.products or weight.lookups:
            weights[value.name or ""] = weight
    return weights


def _read(value: ir.Value, graph: ir.Graph) -> ProductWeight:
    """Return how a matrix is read."""
    weight = ProductWeight(value)
    orders: set[bool] = set()  # of the products: whether the weight is [out, in]
    for node, position in _uses(value, weight):
        turned = node.op_type == "Transpose"
        readers = [(user, index) for user, index in node.outputs[0].uses()] if turned else [(node, position)]
        if turned and (permutation(node) not in ((), (1, 0)) or node.outputs[0].is_graph_output()):
            weight.obstacle = "its transpose is read by more than products"
        for user, index in readers:
            product = _product(user, index, turned)
            if user.graph is not graph:
                weight.obstacle = "a subgraph reads it"
            elif product is not None:
                weight.products.append(product[0])
                orders.add(product[1])
            elif not turned and _is_lookup(user, index):
                weight.lookups.append(user)
            else:
                weight.obstacle = f"{user.op_type} reads it"
    weight.transposed = orders != {False}  # a table [rows, features] that is only looked up, too
    if len(orders) > 1 or (weight.lookups and not weight.transposed):
        weight.obstacle = "it is read along both axes"
    elif weight.shape[0] < SMALLEST:
        weight.obstacle = f"it has fewer than {SMALLEST} input features"
    return weight


def _uses(value: ir.Value, weight: ProductWeight) -> list[tuple[ir.Node, int]]:
    """Return the nodes that read `value` and at which input; note it in `weight` if the value is a graph output."""
    if value.is_graph_output() or value.is_graph_input():
        weight.obstacle = "it is an input or output of the graph"
    return [(node, position) for node, position in value.uses()]


def _product(node: ir.Node, position: int, turned: bool) -> tuple[Product, bool] | None:
    """Return the product that reads a weight as input `position`, and whether the weight is [out, in]; else None.

    `turned`: it reads the weight's transpose.
    """
    if position != 1:
        return None
    attributes = node.attributes
    if node.domain == "" and node.op_type == "MatMul":
        return Product(node), turned
    if node.domain == CONTRIB and node.op_type == "FusedMatMul":
        plain = not any(attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
        if plain and attributes.get_float("alpha", 1.0) == 1:
            return Product(node), turned != bool(attributes.get_int("transB", 0))
    if node.domain == "" and node.op_type == "Gemm":
        plain = not attributes.get_int("transA", 0) and attributes.get_float("alpha", 1.0) == 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            shape = None if bias.const_value is None else tuple(bias.const_value.shape.numpy())
            plain &= bias.is_initializer() and shape is not None and len(shape) == 1 and shape[0] > 1
            plain &= attributes.get_float("beta", 1.0) == 1
        if plain:
            return Product(node, bias), turned != bool(attributes.get_int("transB", 0))
    return None


def _is_lookup(node: ir.Node, position: int) -> bool:
    """Return whether a node looks up rows of its input `position`, at ids of known rank."""
    if node.op_type != "Gather" or node.domain != "" or position != 0 or node.attributes.get_int("axis", 0) != 0:
        return False
    ids = node.inputs[1]
    return ids is not None and ids.shape is not None
