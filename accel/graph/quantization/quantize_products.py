"""Replacement of products and lookups of FP32 weights by operators that read quantized ones."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_initializer, add_node
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.precision.formats import FLOAT
from accel.graph.quantization import blocks as blockwise
from accel.graph.quantization import channels as channelwise
from accel.graph.quantization.blocks import BlockFormat, Blocks
from accel.graph.quantization.channels import Channels
from accel.graph.quantization.formats import WeightFormat
from accel.graph.quantization.products import Product, ProductWeight, find_weights
from accel.graph.weights import fingerprint, tensor_content

Quantized = Blocks | Channels


class QuantizedWeights:
    """Quantized weights by content and format, so that graphs with the same weight quantize it once."""

    def __init__(self) -> None:
        self._quantized: dict[tuple[object, ...], Quantized] = {}

    def __len__(self) -> int:
        return len(self._quantized)

    def get(self, weight: ProductWeight, format: WeightFormat) -> Quantized:
        """Return a weight in a format."""
        key = (fingerprint(weight.value), weight.transposed, format)
        if key not in self._quantized:
            self._quantized[key] = format.quantize(matrix(weight))
        return self._quantized[key]


def matrix(weight: ProductWeight) -> np.ndarray:
    """Return a weight as [in, out].

    Raises:
        ValueError: It has no content.
    """
    tensor = weight.value.const_value
    if tensor is None:
        raise ValueError(f"{weight.value.name} is not an initializer with a value")
    content = tensor_content(tensor)
    return content.T if weight.transposed else content


class QuantizeProducts(GraphPass):
    """Multiply with quantized weights, by `MatMulNBits` or `DynamicQuantizeMatMul`.

    A tied embedding is stored once: `GatherBlockQuantized` reads the integers that the product reads.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized

    Args:
        chosen: Weight -> format. Others stay in FP32.
        quantized: Weights that were quantized before.
    """

    name = "quantize_products"
    description = "Multiply with weights of 8 or 4 bits"

    def __init__(self, chosen: Mapping[str, WeightFormat], quantized: QuantizedWeights) -> None:
        self._chosen, self._quantized = chosen, quantized

    def call(self, model: ir.Model) -> PassResult:
        """Quantize the chosen weights of the main graph."""
        graph, modified = model.graph, False
        for name, weight in find_weights(model).items():
            format = self._chosen.get(name)
            if format is None or weight.obstacle:
                continue
            quantized = self._quantized.get(weight, format)
            modified = True
            if isinstance(format, BlockFormat) and isinstance(quantized, Blocks):
                _use_blocks(graph, weight, format, quantized)
            elif isinstance(quantized, Channels):
                _use_channels(graph, weight, quantized)
        if modified:
            model.graph.opset_imports.setdefault(CONTRIB, 1)
        return remove_unused(model, modified)


def _use_blocks(graph: ir.Graph, weight: ProductWeight, format: BlockFormat, blocks: Blocks) -> None:
    """Let the products and lookups of a weight read its blocks."""
    inputs, outputs = weight.shape
    prefix = f"{weight.value.name}.int{format.bits}"
    data = add_initializer(graph, f"{prefix}.data", blocks.data)
    scales = add_initializer(graph, f"{prefix}.scales", blocks.scales)
    zeros = None
    if blocks.zero_points is not None:
        zeros = add_initializer(graph, f"{prefix}.zero_points", blocks.zero_points)
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": format.bits,
        "block_size": format.block,
        "accuracy_level": blockwise.ACCURACY_LEVEL,
    }

    def node(product: Product) -> ir.Node:
        operands = [product.node.inputs[0], data, scales, zeros, None, product.bias]
        while operands[-1] is None:
            operands.pop()
        return ir.node(blockwise.OPERATOR, operands, attributes, domain=CONTRIB, name=product.node.name)

    _replace_products(weight, node)
    if weight.lookups:
        table = _table(graph, prefix, data, scales, blocks, format)
        for lookup in weight.lookups:
            _look_up_blocks(graph, lookup, table, format, inputs)


def _table(
    graph: ir.Graph, prefix: str, data: ir.Value, scales: ir.Value, blocks: Blocks, format: BlockFormat
) -> list[ir.Value]:
    """Return integers, scales and zero points of a weight as `GatherBlockQuantized` takes them.

    The integers are those of the product. Scales need an axis more than in `MatMulNBits`, and zero points in 8 bits.
    """
    axis = add_initializer(graph, f"{prefix}.axis", np.array([2], np.int64))
    table = [data, add_node(graph, "Unsqueeze", [scales, axis], f"{scales.name}.table", before=graph[0], dtype=FLOAT)]
    if blocks.zero_points is not None:
        zeros = format.unpack(blocks.zero_points)[:, : blocks.scales.shape[1], None]
        table.append(add_initializer(graph, f"{prefix}.zero_points.table", np.ascontiguousarray(zeros)))
    return table


def _look_up_blocks(
    graph: ir.Graph, lookup: ir.Node, table: list[ir.Value], format: BlockFormat, features: int
) -> None:
    """Replace a `Gather` by one that dequantizes the rows it reads."""
    data, *parameters = table
    attributes = {"bits": format.bits, "block_size": format.block, "gather_axis": 0, "quantize_axis": 2}
    ids, output, name = lookup.inputs[1], lookup.outputs[0], lookup.outputs[0].name
    rows = add_node(
        graph, "GatherBlockQuantized", [data, ids, *parameters], f"{name}.blocks",
        attributes=attributes, domain=CONTRIB, dtype=FLOAT, before=lookup,
    )  # fmt: skip
    rank = len(ids.shape) if ids is not None and ids.shape is not None else 0
    target = add_initializer(graph, f"{name}.joined.shape", np.array([*[0] * rank, -1], np.int64))
    joined = add_node(graph, "Reshape", [rows, target], f"{name}.joined", dtype=FLOAT, before=lookup)
    if features % format.block:
        bounds = [
            add_initializer(graph, f"{name}.{key}", np.array([value], np.int64))
            for key, value in (("starts", 0), ("ends", features), ("axes", rank))
        ]
        joined = add_node(graph, "Slice", [joined, *bounds], f"{name}.features", dtype=FLOAT, before=lookup)
    joined.type, joined.shape = output.type, output.shape
    convenience.replace_nodes_and_values(graph, lookup, [lookup], [], [output], [joined])


def _use_channels(graph: ir.Graph, weight: ProductWeight, channels: Channels) -> None:
    """Let the products of a weight read its channels; a table that is looked up stays in FP32 beside them."""
    prefix = f"{weight.value.name}.int8"
    data = add_initializer(graph, f"{prefix}.data", channels.data)
    scales = add_initializer(graph, f"{prefix}.scales", channels.scales)
    zeros = add_initializer(graph, f"{prefix}.zero_points", np.full(len(channels.scales), channelwise.ZERO, np.uint8))

    def node(product: Product) -> ir.Node:
        operands = [product.node.inputs[0], data, scales, zeros]
        if product.bias is not None:
            operands.append(product.bias)
        return ir.node(channelwise.OPERATOR, operands, domain=CONTRIB, name=product.node.name)

    _replace_products(weight, node)


def _replace_products(weight: ProductWeight, make: Callable[[Product], ir.Node]) -> None:
    """Replace the products of a weight by the nodes that `make` returns for them."""
    for product in weight.products:
        graph, new = product.node.graph, make(product)
        if graph is not None:
            convenience.replace_nodes_and_values(
                graph, product.node, [product.node], [new], product.node.outputs, new.outputs
            )


def low_bit_share(model: ir.Model) -> dict[str, float]:
    """Measure how much of the products of a graph, subgraphs included, is in low bits.

    Returns:
        `products`: number of products with a weight; `low_bit_products`: those with a quantized one; `weight_bytes`:
        the share of their weights' bytes, all counted as FP32, that is quantized, from 0 to 1; `fp32_bytes`: the bytes
        of the others.
    """
    low_sizes: list[int] = []
    for node in model.graph.all_nodes():
        if node.op_type == blockwise.OPERATOR:
            low_sizes.append(node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0))
        elif node.op_type == channelwise.OPERATOR and node.inputs[1] is not None:
            tensor = node.inputs[1].const_value
            low_sizes.append(tensor.size if tensor is not None else 0)
    full_sizes = [weight.shape[0] * weight.shape[1] for weight in find_weights(model).values() for _ in weight.products]
    low, full = 4 * sum(low_sizes), 4 * sum(full_sizes)
    return {
        "products": len(low_sizes) + len(full_sizes),
        "low_bit_products": len(low_sizes),
        "weight_bytes": low / max(1, low + full),
        "fp32_bytes": full,
    }
