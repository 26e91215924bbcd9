"""Pattern: a product of the hidden state with a weight, the norm before it, and what follows it feature by feature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from accel.engine.low_bits import LowBits
from accel.engine.nodes import Node
from accel.engine.operations.product import Part, Product
from accel.engine.planning.activations import match_activation
from accel.engine.planning.linear_maps import RESHAPES, VIEWS, is_float_cast
from accel.engine.planning.patterns import NORMS, Fused, Matcher
from accel.engine.planning.trace import LOW_BIT_PRODUCT, PRODUCTS, NoMatchError, Trace


@dataclass
class Draft:
    """A product while it grows.

    Attributes:
        source: Value that holds the rows, before the norm.
        norm: The norm's node, or None.
        part: The product and what follows it.
        tensors: Names of the tensors of the part.
        residuals: Values that are added.
        output: Value that it computes so far.
        nodes: Nodes of the part.
    """

    source: str
    norm: Node | None
    part: Part
    tensors: list[str]
    output: str
    nodes: list[Node]
    residuals: list[str] = field(default_factory=list)


def weight_of(matcher: Matcher, node: Node) -> str | None:
    """Return the weight that a node multiplies the hidden state with; None if it is no such product."""
    if node.kind not in PRODUCTS or node.inputs[0] not in matcher.hidden or node.inputs[1] in matcher.hidden:
        return None
    weight, axes = node.inputs[1], 3 if node.kind == LOW_BIT_PRODUCT else 2
    known = weight in matcher.trace.values and len(matcher.trace.shape(weight)) == axes
    return weight if known and weight not in matcher.trace.graph.runtime else None


@dataclass(frozen=True)
class Weight:
    """The weight of a product's node.

    Attributes:
        tensors: Name of the weight; where it has few bits, of its integers, their scales and their zero points.
        part: How it is stored, and the factor of the product.
        width: Features of the rows.
        features: Features of the product.
        bias: Name of the bias that the node adds; empty if it adds none.
    """

    tensors: list[str]
    part: Part
    width: int
    features: int
    bias: str


def _weight(matcher: Matcher, node: Node) -> Weight:
    """Return the weight of a node that multiplies the hidden state.

    Raises:
        NoMatchError: It is no constant, or the node computes more than the operation.
    """
    trace, factor, attributes = matcher.trace, weight_of(matcher, node), node.attributes
    if factor is None:
        raise NoMatchError(f"{node.name} has no constant weight")
    if node.kind == LOW_BIT_PRODUCT:
        data, scales, zero_points, order, bias = (*node.inputs[1:], *[""] * 4)[:5]
        tensors = [data, scales, *([zero_points] if zero_points else [])]
        if order or any(name not in trace.graph.constants for name in tensors) or not trace.is_weight(scales):
            raise NoMatchError(f"{node.name} has no constant weight in blocks of consecutive features")
        low = LowBits(attributes.get("bits", 4), attributes["block_size"], attributes["K"], bool(zero_points))
        return Weight(tensors, Part(transposed=True, low_bits=low), low.features, attributes["N"], bias)
    name, turned = trace.stored(factor)
    if not trace.is_weight(name):
        raise NoMatchError(f"{node.name} has no constant weight of floating-point numbers")
    if attributes.get("transA", 0) or attributes.get("beta", 1.0) != 1:
        raise NoMatchError(f"{node.name} transposes its first factor or scales its bias")
    transposed = bool(attributes.get("transB", 0)) != turned
    width, features = trace.shape(name)[::-1] if transposed else trace.shape(name)
    part = Part(alpha=attributes.get("alpha", 1.0), transposed=transposed)
    return Weight([name], part, width, features, node.inputs[2] if len(node.inputs) > 2 else "")


def match_product(matcher: Matcher, node: Node) -> Draft:
    """Match the product of one node, with its norm and bias.

    Raises:
        NoMatchError: It is none that the operation computes.
    """
    trace, weight = matcher.trace, _weight(matcher, node)
    width, features = weight.width, weight.features
    source, alpha = matcher.row(node.inputs[0], width), weight.part.alpha
    before = trace.producer.get(source)
    scaled = None if before is None else trace.scaled(before)
    if scaled is not None and scaled[0] in matcher.hidden and trace.uses[source] == 1:
        source, alpha = matcher.row(scaled[0], width), alpha * scaled[1]  # T5 scales what a tied head reads
        before = trace.producer.get(source)
    norm = None
    if before is not None and before.kind in NORMS and is_only_for_products(matcher, source):
        try:
            matcher.norm(before, width)
            source, norm = matcher.row(before.inputs[0], width), before
        except NoMatchError as reason:
            matcher.note(before.name, reason)
    draft = Draft(source, norm, replace(weight.part, alpha=alpha), list(weight.tensors), node.outputs[0], [node])
    if weight.bias:
        if not _is_bias(trace, weight.bias, features):
            raise NoMatchError(f"{node.name} adds {weight.bias}, which is no constant vector of {features} numbers")
        draft.tensors.append(weight.bias)
        draft.part = replace(draft.part, has_bias=True)
    _skip_reshapes(matcher, draft, features)
    if not draft.part.has_bias:
        _add_bias(matcher, draft, features)
        _skip_reshapes(matcher, draft, features)
    return draft


def _skip_reshapes(matcher: Matcher, draft: Draft, features: int) -> None:
    """Take the views of a product that are its rows in another shape."""
    while (node := matcher.trace.only_consumer(draft.output)) is not None and node.kind in RESHAPES:
        shape = matcher.trace.shape(node.outputs[0])
        if shape[-1:] != (features,) or not matcher.is_row(node.outputs[0], features):
            return
        draft.nodes.append(node)
        draft.output = node.outputs[0]


def _is_bias(trace: Trace, name: str, features: int) -> bool:
    """Return whether a value is a constant of one number for each feature, along its last axis."""
    shape = trace.shape(name)
    return trace.is_weight(name) and shape[-1:] == (features,) and all(length == 1 for length in shape[:-1])


def _add_bias(matcher: Matcher, draft: Draft, features: int) -> None:
    """Take the bias that is added to a product."""
    node = matcher.trace.only_consumer(draft.output)
    if node is None or node.kind != ("", "Add"):
        return
    biases = [name for name in node.inputs if name != draft.output and _is_bias(matcher.trace, name, features)]
    if len(biases) == 1:
        draft.tensors += biases
        draft.nodes.append(node)
        draft.part, draft.output = replace(draft.part, has_bias=True), node.outputs[0]


def is_only_for_products(matcher: Matcher, name: str) -> bool:
    """Return whether a value is read only, through views and factors, by products with weights."""
    trace = matcher.trace
    consumers = trace.consumers[name]
    if not consumers or trace.uses[name] != len(consumers):
        return False
    return all(
        weight_of(matcher, node) is not None
        or ((node.kind in VIEWS or trace.scaled(node) is not None) and is_only_for_products(matcher, node.outputs[0]))
        for node in consumers
    )


def extend(matcher: Matcher, draft: Draft) -> None:
    """Take the activation, factors and residuals that follow a product."""
    trace = matcher.trace
    if draft.part.activation.name == "none" and not draft.part.gated:
        try:
            found = match_activation(trace, draft.output)
        except NoMatchError as reason:
            matcher.note(draft.output, reason)
        else:
            draft.part, draft.output = replace(draft.part, activation=found.activation), found.target
            draft.nodes += found.nodes
    while (node := trace.only_consumer(draft.output)) is not None and matcher.is_free(node):
        others = [name for name in node.inputs if name != draft.output]
        scaled = trace.scaled(node)
        if scaled is not None and not draft.residuals:
            draft.part = replace(draft.part, beta=draft.part.beta * scaled[1])
        elif node.kind == ("", "Add") and len(others) == 1 and matcher.is_residual(others[0], draft.output):
            draft.residuals.append(matcher.row(others[0], trace.shape(draft.output)[-1]))
            trace.uses.update(draft.residuals[-1:])  # so that no other product ends behind it
        elif node.kind in RESHAPES and matcher.is_row(node.outputs[0], trace.shape(draft.output)[-1]):
            pass
        elif not is_float_cast(node):
            matcher.note(node.name, f"is no factor, residual or rounding of the product {draft.output} alone")
            return
        draft.nodes.append(node)
        draft.output = node.outputs[0]


def halves(matcher: Matcher, draft: Draft) -> list[Draft]:
    """Return a product as two of half the features if its output is split so, to be gated; else as it is.

    The halves of the weight are views of it.
    """
    trace = matcher.trace
    split = trace.only_consumer(draft.output)
    width = trace.shape(draft.output)[-1]
    is_last_axis = split is not None and split.attributes.get("axis", 0) in (-1, len(trace.shape(draft.output)) - 1)
    if split is None or split.kind != ("", "Split") or not is_last_axis or len(split.outputs) != 2:
        return [draft]
    if any(not name or trace.shape(name)[-1] * 2 != width for name in split.outputs):
        return [draft]
    selections = [_selections(trace, name) for name in split.outputs]
    outputs = [nodes[-1].outputs[0] if nodes else name for nodes, name in zip(selections, split.outputs, strict=True)]
    if not _is_activated(trace, outputs):
        return [draft]
    parts = []
    for index, output in enumerate(outputs):
        tensors = []
        for name in draft.tensors:
            tensor, half = trace.graph.constants[name], f"{name}.half{index}"
            axis = 0 if draft.part.transposed or tensor.ndim == 1 else 1
            trace.graph.constants[half] = tensor.narrow(axis, index * (width // 2), width // 2)
            trace.values[half] = trace.values[name].narrow(axis, index * (width // 2), width // 2)
            tensors.append(half)
        parts.append(replace(draft, tensors=tensors, output=output, nodes=[*draft.nodes, split, *selections[index]]))
    return parts


def _selections(trace: Trace, name: str) -> list[Node]:
    """Return the nodes behind a value that select its only token, such as the one whose logits are computed."""
    found: list[Node] = []
    while (node := trace.only_consumer(name)) is not None and node.kind == ("", "Gather") and node.inputs[0] == name:
        axis = node.attributes.get("axis", 0)
        if {trace.shape(name)[axis], trace.others[name][axis]} != {1} or trace.shape(node.outputs[0]) != trace.shape(
            name
        ):
            break
        found.append(node)
        name = node.outputs[0]
    return found


def _is_activated(trace: Trace, values: Sequence[str]) -> bool:
    """Return whether an activation reads one of the values."""
    for name in values:
        try:
            match_activation(trace, name)
        except NoMatchError:
            continue
        return True
    return False


def gate(matcher: Matcher, drafts: Mapping[str, Draft], node: Node) -> Draft | None:
    """Return the product whose features are those of two products multiplied; None if a `Mul` doesn't compute that.

    Args:
        matcher: The state.
        drafts: Output -> product without anything after its bias.
        node: The node.
    """
    trace = matcher.trace
    for first, second in (node.inputs, node.inputs[::-1]):
        up = drafts.get(second)
        if up is None or trace.uses[second] != 1 or trace.uses[first] != 1 or up.part.alpha != 1:
            continue
        for draft in drafts.values():
            if draft is up or not _have_same_rows(trace, draft, up):
                continue
            try:
                found = match_activation(trace, draft.output)
            except NoMatchError:
                continue
            if found.target == first:
                part = replace(draft.part, activation=found.activation, gated=True, gate_bias=up.part.has_bias)
                nodes = [*draft.nodes, *up.nodes, *found.nodes, node]
                return Draft(draft.source, draft.norm, part, [*draft.tensors, *up.tensors], node.outputs[0], nodes)
        matcher.note(node.name, f"no activation of a product of the same row is the factor of {second}")
    return None


def _have_same_rows(trace: Trace, first: Draft, second: Draft) -> bool:
    """Return whether two products read the same rows and have weights of the same shape, layout and dtype."""
    weights = [trace.values[draft.tensors[0]] for draft in (first, second)]
    return (
        first.source == second.source
        and first.norm is second.norm
        and first.part.transposed == second.part.transposed
        and first.part.low_bits == second.part.low_bits
        and weights[0].shape == weights[1].shape
        and weights[0].dtype == weights[1].dtype
    )


def fuse(matcher: Matcher, drafts: list[Draft]) -> Fused:
    """Return the operation of one product, or of several that share source and norm, and have outputs of one dtype."""
    first, norm = drafts[0], None
    tensors: list[str] = []
    if first.norm is not None:
        weight = matcher.trace.shape(first.norm.inputs[1])
        norm, tensors = matcher.norm(first.norm, weight[0])
    inputs = [first.source, *tensors, *(name for draft in drafts for name in draft.tensors), *first.residuals]
    spec = Product(
        norm,
        len(tensors) > 0,
        len(tensors) > 1,
        tuple(draft.part for draft in drafts),
        len(first.residuals),
        matcher.trace.dtype(first.output),
    )
    nodes = {id(node): node for draft in drafts for node in draft.nodes}
    return Fused("product", spec, inputs, [draft.output for draft in drafts], list(nodes.values()))
