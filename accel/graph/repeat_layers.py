"""Complete the graph of a model of which only the first layers were traced.

Tracing takes time for every layer, though all are alike but for their weights. Layers are recognised by the module
paths that torch's exporter notes at every node ("pkg.torch.onnx.name_scopes").
"""

import ast
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.passes import NoMatchError

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Stack:
    """The layers of a model, of which the last two blocks that were traced are alike.

    Attributes:
        path: Path of the list of layers in the traced module, such as "model.layers".
        traced: Number of layers traced, the first ones.
        period: Number of layers in a block, after which their kinds repeat.
        total: Number of layers of the model; `total - traced` is a multiple of `period`.
    """

    path: str
    traced: int
    period: int
    total: int


@dataclass
class Block:
    """Some layers in a row.

    Attributes:
        nodes: Their nodes, in the graph's order, with the layer of each.
        values: What stands for each value of the last traced block: outputs, and what the block before hands over.
    """

    nodes: list[tuple[ir.Node, int]]
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)


class RepeatLayers:
    """Append the layers that were not traced, as copies of the last traced block with other weights and caches.

    Args:
        stack: The layers.
        caches: Names of the graph's cache inputs and outputs, by layer: the same number for each, in the same order.
        weight: Function that returns the tensor of an initializer of a layer that was not traced.
    """

    def __init__(
        self, stack: Stack, caches: Sequence[Sequence[str]], weight: Callable[[str], ir.TensorProtocol]
    ) -> None:
        self._stack, self._weight = stack, weight
        self._caches = caches
        self._shared: set[ir.Value] = set()  # constants that all copies read, though each traced layer has its own
        self._place = {name: (layer, i) for layer, names in enumerate(caches) for i, name in enumerate(names)}

    def __call__(self, model: ir.Model) -> None:
        """Complete `model` in place. Its cache inputs and outputs end in layer order, behind all others.

        Raises:
            NoMatchError: The last two blocks differ, or other nodes read their values.
        """
        graph, stack = model.graph, self._stack
        layers = _layers(graph, stack.path)
        first, last = (
            Block([(node, layers[node]) for node in graph if begin <= layers.get(node, -1) < begin + stack.period])
            for begin in (stack.traced - 2 * stack.period, stack.traced - stack.period)
        )
        handed_over = self._match(first, last)
        self._check_readers(first, last, set(handed_over.values()))
        last.values = {value: value for node, _ in last.nodes for value in node.outputs}
        previous, inside = last, _nodes(last)
        readers = [(use, value) for value in last.values for use in value.uses() if use.node not in inside]
        for shift in range(stack.period, stack.total - stack.traced + 1, stack.period):
            previous = self._append(graph, last, previous, handed_over, shift)
        for use, value in readers:
            use.node.replace_input_with(use.idx, previous.values[value])
        self._replace_outputs(graph, previous)
        self._sort_caches(graph.inputs)
        self._sort_caches(graph.outputs)
        model.graph.sort()

    def _match(self, first: Block, last: Block) -> dict[ir.Value, ir.Value]:
        """Compare two blocks node by node.

        Returns:
            Value of `first` that `last` reads -> the value of `last` that a further block reads in its place.
        """
        if len(first.nodes) != len(last.nodes) or not first.nodes:
            raise NoMatchError(f"blocks of {len(first.nodes)} and {len(last.nodes)} nodes")
        same: dict[ir.Value, ir.Value] = {}
        for (node, layer), (other, other_layer) in zip(first.nodes, last.nodes, strict=True):
            alike = node.op_identifier() == other.op_identifier() and len(node.outputs) == len(other.outputs)
            if not alike or layer + self._stack.period != other_layer or not _same_attributes(node, other):
                raise NoMatchError(f"{node.name} and {other.name} differ")
            same.update(zip(node.outputs, other.outputs, strict=True))
        handed_over: dict[ir.Value, ir.Value] = {}
        for (node, _), (other, _) in zip(first.nodes, last.nodes, strict=True):
            if len(node.inputs) != len(other.inputs):
                raise NoMatchError(f"{node.name} and {other.name} have other numbers of inputs")
            for value, counterpart in zip(node.inputs, other.inputs, strict=True):
                if value is counterpart or (value in same and same[value] is counterpart):
                    continue
                if counterpart in same:  # an output of `first`
                    handed_over[counterpart] = same[counterpart]
                elif value is None or counterpart is None or not self._correspond(value, counterpart):
                    raise NoMatchError(f"{node.name} and {other.name} read different values")
        return handed_over

    def _correspond(self, value: ir.Value, other: ir.Value) -> bool:
        """Return whether two values are weights or caches of layers one period apart, or constants of equal content."""
        if value.producer() is None and self._renamed(value.name or "", self._stack.period) == other.name:
            return True
        if _equal_constants(value, other):
            self._shared.add(other)
            return True
        return False

    def _renamed(self, name: str, shift: int) -> str | None:
        """Return the name of a weight or cache, `shift` layers on; None if `name` belongs to no layer."""
        if name in self._place:
            layer, i = self._place[name]
            return self._caches[layer + shift][i]
        prefix = f"{self._stack.path}."
        layer_text, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not layer_text.isdecimal():
            return None
        return f"{prefix}{int(layer_text) + shift}.{rest}"

    def _check_readers(self, first: Block, last: Block, final: set[ir.Value]) -> None:
        """Raise `NoMatchError` if nodes behind the layers read more than what the last one hands over."""
        inside = _nodes(first) | _nodes(last)
        for block in (first, last):
            for node, _ in block.nodes:
                for value in node.outputs:
                    outside = [use.node.name for use in value.uses() if use.node not in inside]
                    if outside and (block is first or value not in final):
                        raise NoMatchError(f"{outside[0]} reads a value of {node.name}")
                    if value.is_graph_output() and value.name not in self._place and value not in final:
                        raise NoMatchError(f"{node.name} computes the output {value.name}")

    def _append(
        self, graph: ir.Graph, last: Block, previous: Block, handed_over: Mapping[ir.Value, ir.Value], shift: int
    ) -> Block:
        """Append a copy of the block `last` behind `previous`, and return it."""
        block = Block([], {value: previous.values[result] for value, result in handed_over.items()})
        for node, layer in last.nodes:
            inputs = [self._input(graph, value, block, shift) for value in node.inputs]
            outputs = [self._output(graph, value, layer + shift, shift) for value in node.outputs]
            block.values.update(zip(node.outputs, outputs, strict=True))
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                outputs=outputs,
                overload=node.overload,
                name=f"{node.name}.{layer + shift}",
            )
            block.nodes.append((copy, layer + shift))
        graph.insert_after(previous.nodes[-1][0], [node for node, _ in block.nodes])
        return block

    def _input(self, graph: ir.Graph, value: ir.Value | None, block: Block, shift: int) -> ir.Value | None:
        """Return what stands for an input of the last traced block, `shift` layers on."""
        if value is None or value in self._shared:
            return value
        if value in block.values:
            return block.values[value]
        name = self._renamed(value.name or "", shift) if value.producer() is None else None
        if name is None:
            return value
        known = next((each for each in graph.inputs if each.name == name), graph.initializers.get(name))
        if known is not None:
            return known
        if value.name in self._place:
            new = ir.Value(name=name, type=value.type, shape=value.shape)
            graph.inputs.append(new)
            return new
        weight = self._weight(name)
        if value.shape is None or tuple(weight.shape) != tuple(value.shape):
            raise NoMatchError(f"{name} has the shape {weight.shape}, {value.name} {value.shape}")
        new = ir.Value(name=name, type=value.type, shape=value.shape, const_value=weight)
        graph.register_initializer(new)
        return new

    def _output(self, graph: ir.Graph, value: ir.Value, layer: int, shift: int) -> ir.Value:
        """Return the output of layer `layer` for an output of the last traced block."""
        cache = self._renamed(value.name or "", shift) if value.name in self._place else None
        output = ir.Value(name=cache or f"{value.name}.{layer}", type=value.type, shape=value.shape)
        if cache is not None:
            graph.outputs.append(output)
        return output

    def _replace_outputs(self, graph: ir.Graph, final: Block) -> None:
        """Let the final block compute those outputs that the last traced one did, such as an encoder's last states."""
        for i, output in enumerate(graph.outputs):
            if output.name not in self._place and output in final.values:
                result = final.values[output]
                result.name, output.name = output.name, result.name
                graph.outputs[i] = result

    def _sort_caches(self, values: MutableSequence[ir.Value]) -> None:
        """Order a graph's inputs or outputs: caches behind all others, by layer."""
        ordered = sorted(values, key=lambda value: self._place.get(value.name or "", (-1, 0)))
        values.clear()
        values.extend(ordered)


def _nodes(block: Block) -> set[ir.Node]:
    return {node for node, _ in block.nodes}


def _layers(graph: ir.Graph, path: str) -> dict[ir.Node, int]:
    """Return the layer of each node of the stack. Nodes without scope belong to the one layer that reads them.

    Constants are in no layer.
    """
    layers: dict[ir.Node, int] = {}
    for node in reversed(graph):
        if node.op_type == "Constant":
            continue
        layer = _layer_of_scope(node, path)
        if layer is None and not any(value.is_graph_output() for value in node.outputs):
            readers = {layers.get(use.node) for value in node.outputs for use in value.uses()}
            layer = readers.pop() if len(readers) == 1 else None
        if layer is not None:
            layers[node] = layer
    return layers


def _layer_of_scope(node: ir.Node, path: str) -> int | None:
    """Return the index of the layer whose module computed a node; None if none did."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    for scope in scopes:
        index = scope.removeprefix(f"{path}.")
        if scope.startswith(f"{path}.") and index.isdecimal():
            return int(index)
    return None


def _equal_constants(value: ir.Value, other: ir.Value) -> bool:
    """Return whether both values are constants with the same content."""
    tensors = [convenience.get_const_tensor(each) for each in (value, other)]
    if tensors[0] is None or tensors[1] is None:
        return False
    return tensors[0].dtype == tensors[1].dtype and tensors[0].tobytes() == tensors[1].tobytes()


def _same_attributes(node: ir.Node, other: ir.Node) -> bool:
    """Return whether two nodes have the same attributes. Tensors and graphs count as different."""
    attributes, others = (
        {name: attribute.value for name, attribute in each.attributes.items()} for each in (node, other)
    )
    simple = all(isinstance(value, (int, float, str, tuple, list, type(None))) for value in attributes.values())
    return simple and attributes == others
