"""Compute for each sequence of a batch what a graph computes once for all of them.

A value that is computed from one number has no axis of the batch. Once the number becomes a vector [B], so does the
value: every operator is mapped over the vector, as `jax.vmap` does it.
https://docs.jax.dev/en/latest/_autosummary/jax.vmap.html
"""

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.build import add_node
from accel.graph.cleanup.precompute_position_bias import FUNCTIONS
from accel.graph.shapes import Dims, dims, integers, permutation

ELEMENTWISE = FUNCTIONS | {"Identity", "Cos", "Sin"}


class NotStaticError(ValueError):
    """A graph uses the number of past tokens in a way that a static cache doesn't allow."""

    def __init__(self, node: ir.Node | None, reason: str) -> None:
        super().__init__(f"node {node.name} ({node.op_type}): {reason}" if node is not None else reason)


class PerSequence:
    """The values of a graph that are computed from a number, and now from a vector [B] of numbers.

    Such a value of shape [1, ..., 1, *S] becomes one of shape [B, *S]. Where it meets values of the batch, which have
    as many axes as it had, its axis B takes the place of theirs, without a transposition. The leading axes of length 1
    that are left out need no nodes either.

    Args:
        graph: Changed in place.
        numbers: Values that were scalars and are vectors now.
        batch: Symbol of the axis of the batch.
    """

    def __init__(self, graph: ir.Graph, numbers: Iterable[ir.Value], batch: str | int) -> None:
        self.graph, self.batch = graph, batch
        self.left_out = dict.fromkeys(numbers, 0)  # mapped value -> leading axes of length 1 that it doesn't have now
        self.equal: dict[ir.Value, ir.Value] = {}  # output of a node that isn't needed -> the value that replaces it
        self.widened: dict[tuple[ir.Value, int], ir.Value] = {}  # mapped value and rank -> the value in that rank

    def rewrite_uses(self) -> None:
        """Map every operator that reads a mapped value.

        Raises:
            NotStaticError: An operator can't be mapped, or its output leaves the graph without an axis of the batch.
        """
        for node in list(self.graph):  # in topological order
            if any(value in self.left_out for value in node.inputs):
                self._rewrite(node)
        for value in self.left_out:
            for node, _ in value.uses():
                if node.graph is not self.graph:
                    raise NotStaticError(node, "it reads positions in a subgraph")
            if value.is_graph_output():
                raise NotStaticError(value.producer(), "its output depends on positions and has no axis of the batch")
        for old, new in reversed(self.equal.items()):
            convenience.replace_all_uses_with(old, new)

    def _rewrite(self, node: ir.Node) -> None:
        """Map one operator."""
        if node.domain == "" and node.op_type in ELEMENTWISE:
            self._elementwise(node)
        elif node.domain == "" and node.op_type == "Concat" and all(value in self.left_out for value in node.inputs):
            self._concatenate(node)
        elif node.domain == "" and node.op_type in ("Expand", "Tile") and node.inputs[0] in self.left_out:
            self._repeat(node, node.inputs[0])
        elif node.domain == "" and node.op_type == "Unsqueeze" and node.inputs[0] in self.left_out:
            self._unsqueeze(node, node.inputs[0])
        elif node.domain == "" and node.op_type == "Transpose" and node.inputs[0] in self.left_out:
            self._transpose(node, node.inputs[0])
        elif node.domain == "" and node.op_type == "Gather" and node.inputs[1] in self.left_out:
            self._gather(node, node.inputs[1])
        else:
            raise NotStaticError(node, "it can't be computed for each sequence's position")

    def _axes(self, value: ir.Value) -> int:
        """Return the number of axes S of a mapped value [B, *S]."""
        return len(value.shape or ()) - 1

    def _rank(self, value: ir.Value) -> int:
        """Return the number of axes that a mapped value had before."""
        return self.left_out[value] + self._axes(value)

    def _elementwise(self, node: ir.Node) -> None:
        """Map an operator that broadcasts its inputs."""
        mapped = [value for value in node.inputs if value is not None and value in self.left_out]
        shapes = [self._shape(node, value) for value in node.inputs if value is not None and value not in self.left_out]
        rank = max([*map(self._rank, mapped), *map(len, shapes)])  # of the output before
        axes = max([*map(self._axes, mapped), *map(_axes_of_any_length, shapes)])
        if any(len(shape) == rank and shape[0] == self.batch for shape in shapes if shape):
            new_rank = rank
            if any(self._axes(value) >= rank for value in mapped):
                raise NotStaticError(node, "it broadcasts positions along the axis of the batch")
        else:
            new_rank = max(1 + axes, *map(len, shapes), 1)
            self._map_output(node, rank + 1 - new_rank, rank)
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.left_out:
                node.replace_input_with(index, self._widen(value, new_rank, node))

    def _concatenate(self, node: ir.Node) -> None:
        """Map a `Concat` along an axis that all inputs have."""
        mapped = [value for value in node.inputs if value is not None]
        rank, axes = self._rank(mapped[0]), max(map(self._axes, mapped))
        axis = node.attributes.get_int("axis", 0) % rank - rank  # counted from the end, where no axis is left out
        if axis < -axes:
            raise NotStaticError(node, "it concatenates positions along an axis that the batch takes")
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
        self._map_output(node, rank - axes, rank)
        for index, value in enumerate(mapped):
            node.replace_input_with(index, self._widen(value, 1 + axes, node))

    def _shape(self, node: ir.Node, value: ir.Value) -> Dims:
        """Return the shape of an input that isn't mapped; lengths that are unknown have names of their own."""
        if value.shape is None:
            raise NotStaticError(node, f"it reads positions and {value.name}, whose rank is unknown")
        return tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)

    def _widen(self, value: ir.Value, rank: int, before: ir.Node) -> ir.Value:
        """Return a mapped value [B, *S] as [B, 1, ..., 1, *S]."""
        if 1 + self._axes(value) == rank:
            return value
        if (value, rank) not in self.widened:
            added = rank - 1 - self._axes(value)
            shape = list(value.shape or ())
            self.widened[value, rank] = add_node(
                self.graph,
                "Unsqueeze",
                [value, integers(self.graph, "axes", range(1, 1 + added))],
                dtype=value.dtype,
                shape=ir.Shape([*shape[:1], *[1] * added, *shape[1:]]),
                before=before,
            )
        return self.widened[value, rank]

    def _map_output(self, node: ir.Node, left_out: int, rank: int) -> None:
        """Note the output of a node, which had `rank` axes, as mapped, without `left_out` leading axes."""
        output = node.outputs[0]
        lengths = output.shape[left_out:] if output.shape is not None else [None] * (rank - left_out)
        output.shape = ir.Shape([self.batch, *lengths])
        self.left_out[output] = left_out

    def _repeat(self, node: ir.Node, value: ir.Value) -> None:
        """Remove an `Expand` or `Tile` that changes nothing but the length of the batch's axis."""
        output, own = node.outputs[0], (dims(value) or ())[1:]
        shape = dims(output)
        leading = None if shape is None else shape[: len(shape) - len(own)]
        if shape is None or leading is None or shape[len(leading) :] != own:
            raise NotStaticError(node, "it repeats positions")
        if all(dim == 1 for dim in leading):
            self._map_output(node, len(leading), len(shape))
        elif leading[0] != self.batch or any(dim != 1 for dim in leading[1:]):
            raise NotStaticError(node, "it repeats positions")
        self.equal[output] = self._widen(value, max(len(shape), 1), node) if output not in self.left_out else value

    def _unsqueeze(self, node: ir.Node, value: ir.Value) -> None:
        """Map an `Unsqueeze`; remove it if all its axes are leading ones."""
        axes = convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if axes is None:
            raise NotStaticError(node, "its axes are not constant")
        rank = self._rank(value) + axes.size
        added = {int(axis) % rank for axis in axes.numpy().reshape(-1)}
        left_out, before = 0, self.left_out[value]
        while left_out < rank and (left_out in added or before > 0):
            before -= left_out not in added
            left_out += 1
        self._map_output(node, left_out, rank)
        inner = sorted(axis - left_out + 1 for axis in added if axis >= left_out)
        if inner:
            node.replace_input_with(1, integers(self.graph, "axes", inner))
        else:
            self.equal[node.outputs[0]] = value

    def _transpose(self, node: ir.Node, value: ir.Value) -> None:
        """Map a `Transpose`."""
        rank = self._rank(value)
        order = permutation(node) or tuple(reversed(range(rank)))
        left_out = self.left_out[value]
        if order[:left_out] != tuple(range(left_out)):
            left_out = 0
        node.replace_input_with(0, self._widen(value, 1 + rank - left_out, node))
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, *(axis - left_out + 1 for axis in order[left_out:])])
        self._map_output(node, left_out, rank)

    def _gather(self, node: ir.Node, index: ir.Value) -> None:
        """Map a `Gather` of rows by positions."""
        data = node.inputs[0]
        if data is None or data in self.left_out or node.attributes.get_int("axis", 0) != 0:
            raise NotStaticError(node, "it takes positions as indices into another axis than the first")
        self._map_output(node, self.left_out[index], self._rank(index) + len(self._shape(node, data)) - 1)


def _axes_of_any_length(shape: Dims) -> int:
    """Return the number of axes behind the leading ones of length 1."""
    return next((len(shape) - axis for axis, dim in enumerate(shape) if dim != 1), 0)
