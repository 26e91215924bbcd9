"""Pattern: a product of the hidden state with a weight, the norm before it, and what follows it feature by feature."""

from dataclasses import dataclass, field, replace

from accel.engine.nodes import Node
from accel.engine.operations.normalize import Norm
from accel.engine.operations.product import Part, Product
from accel.engine.planning.activations import match_activation
from accel.engine.planning.linear_maps import NORMS, RMS_NORM
from accel.engine.planning.patterns import Fused, Matcher
from accel.engine.planning.trace import NoMatchError, Trace
from accel.engine.registry import MICROSOFT

PRODUCTS = {("", "MatMul"), ("", "Gemm"), (MICROSOFT, "FusedMatMul")}


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
        shared: Nodes before the product, which other products may share.
    """

    source: str
    norm: Node | None
    part: Part
    tensors: list[str]
    output: str
    nodes: list[Node]
    shared: list[Node]
    residuals: list[str] = field(default_factory=list)


def weight_of(matcher: Matcher, node: Node) -> str | None:
    """Return the weight that a node multiplies the hidden state with; None if it is no such product."""
    if node.kind not in PRODUCTS or node.inputs[0] not in matcher.hidden or node.inputs[1] in matcher.hidden:
        return None
    weight = node.inputs[1]
    known = weight in matcher.trace.values and len(matcher.trace.shape(weight)) == 2
    return weight if known and weight not in matcher.trace.graph.runtime else None


def match_product(matcher: Matcher, node: Node) -> Draft:
    """Match the product of one node, with its norm and bias.

    Raises:
        NoMatchError: It is none that the operation computes.
    """
    trace, weight = matcher.trace, weight_of(matcher, node)
    if weight is None or weight not in trace.graph.constants:
        raise NoMatchError(f"{node.name} has no constant weight of two axes")
    attributes = node.attributes
    if attributes.get("transA", 0) or attributes.get("beta", 1.0) != 1:
        raise NoMatchError(f"{node.name} transposes its first factor or scales its bias")
    region = matcher.row(node.inputs[0])
    source, norm, alpha, shared = region.root, None, attributes.get("alpha", 1.0), list(region.nodes)
    scaling = trace.producer.get(source)
    if scaling is not None and scaling.kind in (("", "Mul"), ("", "Div")) and scaling.inputs[0] in matcher.hidden:
        factor = trace.scalar(scaling.inputs[1])
        if factor is not None and trace.uses[source] == 1:  # T5 scales the hidden state before a tied head
            alpha *= factor if scaling.kind[1] == "Mul" else 1 / factor
            region = matcher.row(scaling.inputs[0])
            source, shared = region.root, [*region.nodes, scaling, *shared]
    before = trace.producer.get(source)
    if before is not None and before.kind in NORMS and is_only_for_products(matcher, source):
        region = matcher.row(before.inputs[0])
        source, norm, shared = region.root, before, [*region.nodes, before, *shared]
    part = Part(alpha=alpha, transposed=bool(attributes.get("transB", 0)))
    draft = Draft(source, norm, part, [weight], node.outputs[0], [node], shared)
    if len(node.inputs) > 2 and node.inputs[2]:
        draft.tensors.append(node.inputs[2])
        draft.part = replace(part, has_bias=True)
    _add_bias(matcher, draft)
    return draft


def is_only_for_products(matcher: Matcher, name: str) -> bool:
    """Return whether a value is read only, through views, by products with weights."""
    trace = matcher.trace
    if name in trace.graph.outputs or not trace.consumers[name]:
        return False
    for node in trace.consumers[name]:
        if weight_of(matcher, node) is not None:
            continue
        scales = node.kind in (("", "Mul"), ("", "Div")) and trace.scalar(node.inputs[1]) is not None
        if not (
            scales or node.kind[1] in ("Reshape", "Transpose", "GatherND", "Squeeze", "Unsqueeze", "Gather", "Cast")
        ):
            return False
        if not is_only_for_products(matcher, node.outputs[0]):
            return False
    return True


def _add_bias(matcher: Matcher, draft: Draft) -> None:
    """Take the bias that is added to a product."""
    trace = matcher.trace
    node = trace.only_consumer(draft.output)
    if node is None or node.kind != ("", "Add") or draft.part.has_bias:
        return
    for name in node.inputs:
        if name != draft.output and name in trace.graph.constants and len(trace.shape(name)) == 1:
            if trace.shape(name) == trace.shape(draft.output)[-1:]:
                draft.tensors.append(name)
                draft.nodes.append(node)
                draft.part, draft.output = replace(draft.part, has_bias=True), node.outputs[0]


def extend(matcher: Matcher, draft: Draft) -> None:
    """Take the activation, factors and residuals that follow a product."""
    trace = matcher.trace
    if draft.part.activation.name == "none" and not draft.part.gated:
        try:
            found = match_activation(trace, draft.output)
        except NoMatchError:
            pass
        else:
            draft.part, draft.output = replace(draft.part, activation=found.activation), found.target
            draft.nodes += found.nodes
    while (node := trace.only_consumer(draft.output)) is not None and matcher.is_free(node):
        others = [name for name in node.inputs if name != draft.output]
        factor = trace.scalar(others[0]) if len(others) == 1 else None
        if node.kind == ("", "Mul") and factor is not None and not draft.residuals:
            draft.part = replace(draft.part, beta=draft.part.beta * factor)
        elif node.kind == ("", "Div") and node.inputs[0] == draft.output and factor and not draft.residuals:
            draft.part = replace(draft.part, beta=draft.part.beta / factor)
        elif node.kind == ("", "Add") and len(others) == 1 and _is_residual(matcher, draft, others[0]):
            draft.residuals.append(others[0])
        elif node.kind != ("", "Cast"):
            return
        draft.nodes.append(node)
        draft.output = node.outputs[0]


def _is_residual(matcher: Matcher, draft: Draft, name: str) -> bool:
    """Return whether a value is a row of the product's shape that is known before it."""
    return name in matcher.hidden and matcher.trace.shape(name) == matcher.trace.shape(draft.output)


def halves(matcher: Matcher, draft: Draft) -> list[Draft]:
    """Return a product as two of half the features if its output is split so, to be gated; else as it is.

    The halves of the weight are views of it.
    """
    trace = matcher.trace
    split = trace.only_consumer(draft.output)
    width = trace.shape(draft.output)[-1]
    is_last_axis = split is not None and split.attributes.get("axis", 0) in (-1, len(trace.shape(draft.output)) - 1)
    if split is None or split.kind != ("", "Split") or not is_last_axis or len(split.outputs) != 2 or draft.residuals:
        return [draft]
    if any(trace.shape(name)[-1] * 2 != width for name in split.outputs) or not _is_activated(trace, split):
        return [draft]
    parts = []
    for index, output in enumerate(split.outputs):
        tensors = []
        for name in draft.tensors:
            tensor, half = trace.graph.constants[name], f"{name}.half{index}"
            axis = 0 if draft.part.transposed or tensor.ndim == 1 else 1
            trace.graph.constants[half] = tensor.narrow(axis, index * (width // 2), width // 2)
            trace.values[half] = trace.values[name].narrow(axis, index * (width // 2), width // 2)
            tensors.append(half)
        parts.append(replace(draft, tensors=tensors, output=output, nodes=[*draft.nodes, split]))
    return parts


def _is_activated(trace: Trace, split: Node) -> bool:
    """Return whether an activation reads one of the parts."""
    for name in split.outputs:
        try:
            match_activation(trace, name)
        except NoMatchError:
            continue
        return True
    return False


def gate(matcher: Matcher, drafts: dict[str, Draft], node: Node) -> Draft | None:
    """Return the product whose features are those of two products multiplied; None if a `Mul` doesn't compute that.

    Args:
        matcher: The state.
        drafts: Output -> product without anything after its bias.
        node: The node.
    """
    trace = matcher.trace
    for first, second in (node.inputs, node.inputs[::-1]):
        up = drafts.get(second)
        if up is None or trace.uses[second] != 1:
            continue
        for draft in drafts.values():
            if (
                draft is up
                or (draft.source, draft.norm) != (up.source, up.norm)
                or draft.part.transposed != up.part.transposed
            ):
                continue
            if up.part.alpha != 1 or trace.shape(draft.output) != trace.shape(up.output):
                continue
            try:
                found = match_activation(trace, draft.output)
            except NoMatchError:
                continue
            if found.target == first and trace.uses[first] == 1:
                part = replace(draft.part, activation=found.activation, gated=True, gate_bias=up.part.has_bias)
                nodes = [*draft.nodes, *up.nodes, *found.nodes, node]
                tensors = [*draft.tensors, *up.tensors]
                return Draft(
                    draft.source, draft.norm, part, tensors, node.outputs[0], nodes, [*draft.shared, *up.shared]
                )
    return None


def fuse(matcher: Matcher, drafts: list[Draft]) -> Fused:
    """Return the operation of one product, or of several that share source and norm."""
    first = drafts[0]
    inputs, norm = [first.source], None
    tensors: list[str] = []
    if first.norm is not None:
        kind = "rms" if first.norm.kind == RMS_NORM else "layer"
        norm = Norm(kind, first.norm.attributes.get("epsilon", 1e-5))
        tensors = [name for name in first.norm.inputs[1:] if name]
    inputs += tensors
    for draft in drafts:
        inputs += draft.tensors
    inputs += first.residuals
    spec = Product(
        norm,
        len(tensors) > 0,
        len(tensors) > 1,
        tuple(draft.part for draft in drafts),
        len(first.residuals),
        matcher.dtype(first.output),
    )
    nodes = {id(node): node for draft in drafts for node in draft.nodes}
    return Fused("product", spec, inputs, [draft.output for draft in drafts], list(nodes.values()))
