"""Store stacked weights that are only read one by one, such as those of experts, as separate weights.

Slices of a stack are cut in every run, unless the runtime folds them, which it does once per branch of an `If`.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass
from accel.graph.weights import set_origin, tensor_content


class UnstackExpertWeights(GraphPass):
    """Store a weight layer by layer if every graph only gathers single layers of it, by constant indices."""

    name = "unstack_expert_weights"
    description = "Store stacked weights of experts one by one"

    def prepare(self, models: Sequence[ir.Model]) -> None:
        """Collect the weights that some graph reads otherwise."""
        self._kept: set[str] = set()
        for model in models:
            for name, weight in model.graph.initializers.items():
                if _gathered_layers(weight) is None:
                    self._kept.add(name)

    def call(self, model: ir.Model) -> PassResult:
        """Split the weights that all graphs read layer by layer."""
        modified = False
        for name, weight in list(model.graph.initializers.items()):
            layers, tensor = _gathered_layers(weight), weight.const_value
            if name not in self._kept and layers is not None and tensor is not None:
                _split(model.graph, tensor, layers, name)
                del model.graph.initializers[name]
                modified = True
        return PassResult(model, modified)


def _gathered_layers(weight: ir.Value) -> dict[ir.Node, int] | None:
    """Return which layer of the first axis each consumer gathers; None if any reads the weight otherwise."""
    tensor, consumers = weight.const_value, weight.consumers()
    if tensor is None or len(tensor.shape) < 2 or not consumers or weight.is_graph_output():
        return None
    layers: dict[ir.Node, int] = {}
    for node in consumers:
        index = _gathered_layer(node)
        if index is None or node.inputs[0] is not weight:
            return None
        layers[node] = index % tensor.shape.numpy()[0]  # a negative index counts from the end
    return layers


def _gathered_layer(node: ir.Node) -> int | None:
    """Return the constant index by which a `Gather` reads one layer of the first axis; None for any other node."""
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return None
    index = convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if index is None or len(index.shape) != 0 or node.outputs[0].is_graph_output():
        return None
    return int(index.numpy())


def _split(graph: ir.Graph, stack: ir.TensorProtocol, layers: dict[ir.Node, int], name: str) -> None:
    """Replace each `Gather` of a stack by an initializer that holds the layer."""
    weights: dict[int, ir.Value] = {}
    for node, index in layers.items():
        if index not in weights:
            weights[index] = _layer(stack, index, f"{name}.{index}")
            graph.register_initializer(weights[index])
        convenience.replace_all_uses_with(node.outputs[0], weights[index])
        if node.graph is not None:
            node.graph.remove(node, safe=True)


def _layer(tensor: ir.TensorProtocol, index: int, name: str) -> ir.Value:
    """Return an initializer that holds one layer of `tensor`, copied when it is read."""

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor_content(tensor)[index]), dtype=tensor.dtype)

    shape = ir.Shape(tensor.shape.numpy()[1:])
    layer = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
    layer.const_value = ir.LazyTensor(load, dtype=tensor.dtype, shape=shape, name=name)
    set_origin(layer.const_value, ("layer", index), [tensor])
    return layer
