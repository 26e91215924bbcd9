"""Match the attention of one token over static caches, whose mask shows a sliding window of them alone."""

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.decode.window_mask import WindowMask
from accel.graph.passes import NoMatchError
from accel.graph.shapes import dims, made_by, scalar

VIEWS = ("Transpose", "Unsqueeze", "Expand", "Reshape", "Cast", "Identity")
SCALES = ("Mul", "Div", "Tanh")


@dataclass(frozen=True)
class Use:
    """Input `index` of `node`."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value | None:
        """The input."""
        return self.node.inputs[self.index]


@dataclass
class WindowLayer:
    """Attention of one token, with a sliding window.

    Attributes:
        probabilities: Output of its softmax, [batch, heads, 1 or more, keys].
        writes: The nodes that write the token's key and value into their caches.
        biases: What is added to the scores.
        lengths: Numbers of keys among the inputs of a `Concat` that makes the shape of a view.
        nodes: The nodes between the writes and the product with the values, which are part of it.
        window: Number of keys that the token sees at most, its own included.
    """

    probabilities: ir.Value
    writes: list[ir.Node] = field(default_factory=list)
    biases: list[Use] = field(default_factory=list)
    lengths: list[tuple[Use, list[int]]] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    window: int = 0

    @property
    def keys(self) -> str:
        """Symbol of the axis of keys."""
        return str((dims(self.probabilities) or ("",))[-1])

    @property
    def position(self) -> ir.Value:
        """Positions that entries are written at, [batch]."""
        position = self.writes[0].inputs[2] if len(self.writes[0].inputs) > 2 else None
        if position is None:
            raise NoMatchError(f"{self.writes[0].name} writes no position of its own for each sequence")
        return position

    @property
    def caches(self) -> list[ir.Value]:
        """Both caches, before the token's entries are written."""
        return [write.inputs[0] for write in self.writes if write.inputs[0] is not None]


def match(softmax: ir.Node) -> WindowLayer:
    """Match a layer with a sliding window around a softmax.

    Raises:
        NoMatchError: It isn't attention over two static caches, or no mask limits it to a window.
    """
    layer = WindowLayer(softmax.outputs[0])
    shape = dims(softmax.outputs[0])
    if shape is None or len(shape) != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NoMatchError(f"the softmax has shape {shape}, expected 4 axes and axis=-1")
    layer.nodes.append(softmax)
    product = _product_behind(layer, softmax.outputs[0])
    for value in (_product_before(layer, softmax.inputs[0]).inputs[1], product.inputs[1]):
        layer.writes.append(_write(layer, value))
    _check_caches(layer)
    _check_readers(layer, product)
    mask = WindowMask(layer.position, layer.keys)
    windows = [window for window in (mask.window(use.value) for use in layer.biases) if window is not None]
    if not windows:
        raise NoMatchError("no mask of its scores is seen to limit it to a window")
    for use in layer.biases:
        bias = dims(use.value)
        if bias is None or len(bias) != 4 or (bias[0], *bias[2:]) != (shape[0], 1, shape[3]):
            raise NoMatchError(f"a bias of shape {bias} has no row for each sequence")
    layer.window = min(windows)
    return layer


def shape_nodes(cache: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the shape of a cache."""
    return [node for node in cache.consumers() if node.op_type == "Shape" and node.domain == ""]


def reads(shape: ir.Node, axis: int) -> bool:
    """Return whether a `Shape` node reads an axis; raise `NoMatchError` if it reads others with it."""
    rank = len(shape.inputs[0].shape or ()) if shape.inputs[0] is not None else 0
    start, end, _ = slice(shape.attributes.get_int("start", 0), shape.attributes.get_int("end", rank)).indices(rank)
    if start <= axis < end and end - start > 1:
        raise NoMatchError(f"{shape.name} reads the length of a cache together with others")
    return start <= axis < end


def token_axis(write: ir.Node) -> int:
    """Return the axis of tokens of the cache that a node writes."""
    rank = len(write.outputs[0].shape or ())
    return write.attributes.get_int("axis", -2) % rank if rank else 0


def _product_behind(layer: WindowLayer, value: ir.Value) -> ir.Node:
    """Return the product of the probabilities with the values."""
    while True:
        node = next(iter(value.consumers()), None)
        if node is None or len(value.uses()) != 1 or node.domain:
            raise NoMatchError("the probabilities are not read by one product alone")
        if node.op_type == "MatMul" and node.inputs[0] is value:
            return node
        if node.op_type != "Cast":
            raise NoMatchError(f"{node.name} reads the probabilities, expected a product with the values")
        layer.nodes.append(node)
        value = node.outputs[0]


def _product_before(layer: WindowLayer, value: ir.Value | None) -> ir.Node:
    """Return the product of queries and keys that scores are computed from, and note what is added to them."""
    while (node := made_by(value, "MatMul", "Add", *SCALES, *VIEWS)) is not None:
        layer.nodes.append(node)
        if node.op_type == "MatMul":
            return node
        own = [index for index, each in enumerate(node.inputs) if _has_product(each)]
        if len(own) != 1:
            break
        others = [index for index in range(len(node.inputs)) if index != own[0]]
        if node.op_type == "Add":
            layer.biases.append(Use(node, others[0]))
        elif node.op_type in VIEWS:
            _note_lengths(layer, node)
        elif any(scalar(node.inputs[index]) is None for index in others):
            break
        value = node.inputs[own[0]]
    raise NoMatchError("the softmax is not of a scaled product of queries and keys, plus biases")


def _has_product(value: ir.Value | None) -> bool:
    """Return whether a value is computed from a product by additions, factors and views."""
    node = made_by(value, "MatMul", "Add", *SCALES, *VIEWS)
    if node is None or node.op_type == "MatMul":
        return node is not None
    return any(map(_has_product, node.inputs[:1] if node.op_type in VIEWS else node.inputs))


def _write(layer: WindowLayer, value: ir.Value | None) -> ir.Node:
    """Return the node that writes the cache which keys or values are a view of."""
    while (node := made_by(value, "TensorScatter", *VIEWS)) is not None:
        layer.nodes.append(node)
        if node.op_type == "TensorScatter":
            return node
        _note_lengths(layer, node)
        value = node.inputs[0]
    raise NoMatchError("keys or values are no view of a static cache")


def _note_lengths(layer: WindowLayer, view: ir.Node) -> None:
    """Note where the shape of a view takes the number of keys from; raise `NoMatchError` if that isn't known."""
    if view.op_type not in ("Expand", "Reshape") or _is_constant(view.inputs[1]):
        return
    concat = made_by(view.inputs[1], "Concat")
    if concat is None:
        raise NoMatchError(f"{view.name} takes its shape from elsewhere than a Concat of lengths")
    parts = []
    for index, part in enumerate(concat.inputs):
        shape = made_by(part, "Shape")
        source = dims(shape.inputs[0]) if shape is not None else None
        if shape is not None and source is not None and layer.keys in source:
            if reads(shape, source.index(layer.keys)):
                parts.append(index)
        elif shape is None and not _is_constant(part):
            raise NoMatchError(f"{view.name} has a length of unknown origin")
    if parts:
        layer.lengths.append((Use(view, 1), parts))


def _is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is a constant."""
    return value is not None and convenience.get_const_tensor(value) is not None


def _check_caches(layer: WindowLayer) -> None:
    """Raise `NoMatchError` if both caches can't have another length than others."""
    first = layer.writes[0]
    for write in layer.writes:
        cache = write.inputs[0]
        shape = dims(cache)
        if cache is None or shape is None or not cache.is_graph_input() or shape[token_axis(write)] != layer.keys:
            raise NoMatchError(f"{write.name} doesn't write one token's entry into a cache of {layer.keys}")
        if (dims(write.inputs[1]) or ())[token_axis(write)] != 1 or write.inputs[2:] != first.inputs[2:]:
            raise NoMatchError(f"{write.name} writes several entries, or at another position than {first.name}")
        for node in shape_nodes(cache):
            reads(node, token_axis(write))
        if any(node not in (write, *shape_nodes(cache)) for node in cache.consumers()):
            raise NoMatchError(f"{cache.name} is read by other nodes than {write.name}")


def _check_readers(layer: WindowLayer, product: ir.Node) -> None:
    """Raise `NoMatchError` if another node reads what is as long as the caches."""
    for node in layer.nodes:
        output = node.outputs[0]
        if any(reader not in (*layer.nodes, product) for reader in output.consumers()):
            raise NoMatchError(f"{output.name} is read by nodes that are no part of the attention")
        if output.is_graph_output() and node not in layer.writes:
            raise NoMatchError(f"{output.name} is an output of the graph")
