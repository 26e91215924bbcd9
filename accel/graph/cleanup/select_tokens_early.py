"""Compute the end of a decoder only for those tokens whose logits are kept."""

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.fusion.fuse_skip_norm import FUSED
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import Dims, dims, made_by, permutation, scalar, used_once

SWAP = (1, 0, 2)  # [B, S, H] -> [S, B, H] and back
# Operators that compute each element, or each vector along the last axis, from the same one of their inputs.
UNARY = ("Cast", "Clip", "Sigmoid", "Tanh", "Erf", "Gelu", "Relu")
ELEMENTWISE = (*UNARY, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")
NORMS = (*FUSED, *FUSED.values())


@dataclass
class Selection:
    """Choice of the tokens whose logits are kept: Transpose(GatherND(Transpose(hidden), Unsqueeze(indices))).

    Attributes:
        hidden: Last hidden states, [batch, tokens, features].
        indices: Indices of the kept tokens, [kept].
        kept: Those tokens' hidden states, [batch, kept, features].
    """

    hidden: ir.Value
    indices: ir.Value
    kept: ir.Value


class SelectTokensEarly(GraphPass):
    """Select the tokens whose logits are kept before the operations that treat each token alone.

    Those are, in the last layer, all behind the attention: its output projection, the feed-forward network and the
    norms. The last token of a prompt is usually the only one whose logits are kept. The exporter writes
    `hidden[:, indices]` as `GatherND` between two transposes.
    """

    name = "select_tokens_early"
    description = "Compute the last layer for kept tokens only"

    def call(self, model: ir.Model) -> PassResult:
        """Move the selection in the main graph."""
        gathers = [node for node in model.graph if node.op_type == "GatherND" and node.domain == ""]
        modified = self.rewrite_each(gathers, lambda gather: _move(model.graph, _match(gather)))
        if modified:
            model.graph.sort()
        return remove_unused(model, modified)


def _match(gather: ir.Node) -> Selection:
    """Match the selection around a `GatherND`; raise `NoMatchError` if it is of something else."""
    before, unsqueeze = made_by(gather.inputs[0], "Transpose"), made_by(gather.inputs[1], "Unsqueeze")
    output = gather.outputs[0]
    behind = next(iter(output.uses())).node if used_once(output) else None
    if before is None or behind is None or behind.op_type != "Transpose":
        raise NoMatchError("it isn't between two transposes")
    if permutation(before) != SWAP or permutation(behind) != SWAP:
        raise NoMatchError("the transposes don't swap sequences and tokens")
    hidden, indices = before.inputs[0], unsqueeze.inputs[0] if unsqueeze is not None else None
    if unsqueeze is None or indices is None or scalar(unsqueeze.inputs[1]) not in (-1, 1):
        raise NoMatchError("its indices are not those of one axis")
    if hidden is None or not used_once(hidden) or not used_once(before.outputs[0]):
        raise NoMatchError("other nodes read the hidden states")
    if behind.outputs[0].is_graph_output():
        raise NoMatchError("the caller reads them")
    if len(dims(indices) or ()) != 1 or gather.attributes.get_int("batch_dims", 0) != 0:
        raise NoMatchError("its indices are no vector")
    expand = made_by(indices, "Expand")  # into the shape of the indices, of which the exporter takes the maximum
    if expand is not None and expand.inputs[0] is not None and dims(expand.inputs[0]) == dims(indices):
        indices = expand.inputs[0]
    return Selection(hidden, indices, behind.outputs[0])


def _move(graph: ir.Graph, selection: Selection) -> None:
    """Select from what `_row_wise_nodes` read; raise `NoMatchError` where that saves no product."""
    shape, kept = dims(selection.hidden), dims(selection.kept)
    if shape is None or kept is None or len(shape) != 3 or isinstance(shape[1], int):
        raise NoMatchError(f"the hidden states have the shape {shape}")
    nodes = _row_wise_nodes(graph, selection.hidden, shape[:2])
    if not any(node.op_type == "MatMul" for node in nodes):
        raise NoMatchError("no product only depends on one token")
    selected: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is None or not _is_per_token(value, shape[:2]) or value.producer() in nodes:
                continue
            if value not in selected:
                name = f"{value.name}_kept"
                selected[value] = add_node(
                    graph,
                    "Gather",
                    [value, selection.indices],
                    name,
                    attributes={"axis": 1},
                    dtype=value.dtype,
                    shape=_with_tokens(value, kept[1]),
                )
            node.replace_input_with(position, selected[value])
    for node in nodes:
        for output in node.outputs:
            if output.shape is not None:
                output.shape = _with_tokens(output, kept[1])
    convenience.replace_all_uses_with(selection.kept, selection.hidden)


def _with_tokens(value: ir.Value, tokens: int | str) -> ir.Shape:
    """Return the shape of `value` with another number of tokens."""
    shape = value.shape or ir.Shape([])
    return ir.Shape([shape[0], tokens, *shape[2:]])


def _row_wise_nodes(graph: ir.Graph, hidden: ir.Value, tokens: Dims) -> set[ir.Node]:
    """Return the nodes before `hidden` that treat each token alone, and whose results nothing else reads."""
    nodes: set[ir.Node] = set()
    for node in reversed(graph):
        outputs = [output for output in node.outputs if output.uses() or output.is_graph_output()]
        if outputs and all(_leads_only_to(output, nodes, hidden) for output in outputs) and _is_row_wise(node, tokens):
            nodes.add(node)
    return nodes


def _leads_only_to(value: ir.Value, nodes: Collection[ir.Node], hidden: ir.Value) -> bool:
    """Return whether `value` is `hidden`, or only `nodes` read it."""
    return value is hidden or (not value.is_graph_output() and all(use.node in nodes for use in value.uses()))


def _is_row_wise(node: ir.Node, tokens: Dims) -> bool:
    """Return whether each token of the output depends on the same token of the inputs alone."""
    if node.op_type == "MatMul":
        return _is_per_token(node.inputs[0], tokens) and len(_constant_dims(node.inputs[1]) or ()) == 2
    if node.op_type in NORMS:
        if node.attributes.get_int("axis", -1) not in (-1, 2):
            return False
    elif node.op_type not in ELEMENTWISE or node.domain != "":
        return False
    values = [value for value in node.inputs if value is not None]
    per_token = [_is_per_token(value, tokens) for value in values]
    return any(per_token) and all(map(bool.__or__, per_token, map(_is_feature_vector, values)))


def _is_per_token(value: ir.Value | None, tokens: Dims) -> bool:
    """Return whether `value` has the shape [batch, tokens, features] and depends on the model's inputs."""
    shape = dims(value)
    return shape is not None and len(shape) == 3 and shape[:2] == tokens


def _is_feature_vector(value: ir.Value) -> bool:
    """Return whether `value` is a constant that is the same for every token."""
    shape = _constant_dims(value)
    return shape is not None and all(length == 1 for length in shape[:-1])


def _constant_dims(value: ir.Value | None) -> Dims | None:
    """Return the shape of a constant; None for any other value."""
    tensor = convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tuple(tensor.shape.numpy())
