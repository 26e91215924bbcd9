"""Read from an attention mask how many keys it shows at most: the length of its sliding window."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from accel.graph.shapes import dims, made_by, scalar

HIDDEN = -1e4  # a number this low, added to a score, leaves no weight after a softmax; masks have a dtype's lowest
VIEWS = ("Unsqueeze", "Reshape", "Expand", "Cast", "Identity")
# Operator -> sign of its first input and a number, such that it compares their sum, less the second input, with > 0.
COMPARISONS = {"Greater": (1, 0), "GreaterOrEqual": (1, 1), "Less": (-1, 0), "LessOrEqual": (-1, 1)}


@dataclass(frozen=True)
class Sum:
    """A number as `key` times the position of a key, `query` times that of the query, and `rest`."""

    key: int = 0
    query: int = 0
    rest: int = 0

    def plus(self, other: "Sum", sign: int = 1) -> "Sum":
        """Return this number plus `sign` times `other`."""
        return Sum(self.key + sign * other.key, self.query + sign * other.query, self.rest + sign * other.rest)


@dataclass(frozen=True)
class WindowMask:
    """Masks of the scores of one query for each sequence, [batch, heads, 1, keys].

    Attributes:
        position: Input that holds the query's position, [batch].
        keys: Symbol of the axis of keys.
    """

    position: ir.Value
    keys: str

    def window(self, bias: ir.Value | None) -> int | None:
        """Return W if a bias hides all keys but the last W, the query's own included; None if it isn't seen to."""
        node = made_by(bias, "Where", "Add", *VIEWS)
        if node is None:
            return None
        if node.op_type == "Where":
            hidden = scalar(node.inputs[2])
            return self._shown(node.inputs[0]) if hidden is not None and hidden <= HIDDEN else None
        if node.op_type == "Add":
            return _least(map(self.window, node.inputs))
        return self.window(node.inputs[0]) if self._keeps_keys(node) else None

    def _shown(self, condition: ir.Value | None) -> int | None:
        """Return W if a condition holds for none but the last W keys."""
        node = made_by(condition, "And", *COMPARISONS, *VIEWS)
        if node is None:
            return None
        if node.op_type == "And":
            return _least(map(self._shown, node.inputs))
        if node.op_type in VIEWS:
            return self._shown(node.inputs[0]) if self._keeps_keys(node) else None
        first, second = map(self._sum, node.inputs)
        if first is None or second is None:
            return None
        sign, more = COMPARISONS[node.op_type]
        limit = Sum(rest=more).plus(first, sign).plus(second, -sign)  # limit > 0
        return limit.rest if (limit.key, limit.query) == (1, -1) and limit.rest > 0 else None

    def _sum(self, value: ir.Value | None) -> Sum | None:
        """Return integers as sums of positions; None for any others."""
        number = scalar(value)
        if value is self.position:
            return Sum(query=1)
        if number is not None:
            return Sum(rest=int(number)) if number.is_integer() else None
        node = made_by(value, "Range", "Add", "Sub", *VIEWS)
        if node is None or (node.op_type == "Cast" and not _is_integer(node)):
            return None
        if node.op_type == "Range":
            counts_keys = dims(value) == (self.keys,) and scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1
            return Sum(key=1) if counts_keys else None
        if node.op_type in VIEWS:
            return self._sum(node.inputs[0]) if self._keeps_keys(node) else None
        first, second = map(self._sum, node.inputs)
        if first is None or second is None:
            return None
        return first.plus(second, -1 if node.op_type == "Sub" else 1)

    def _keeps_keys(self, view: ir.Node) -> bool:
        """Return whether the axis of keys, if there is one, is the last before and after a view."""
        before, after = dims(view.inputs[0]), dims(view.outputs[0])
        if before is None or after is None:
            return False
        return self.keys not in (*before[:-1], *after[:-1]) and before.count(self.keys) == after.count(self.keys)


def _least(windows: Iterable[int | None]) -> int | None:
    """Return the shortest of several windows."""
    return min((window for window in windows if window is not None), default=None)


def _is_integer(cast: ir.Node) -> bool:
    """Return whether a `Cast` is to integers of at least 32 bits."""
    return cast.attributes.get_int("to", 0) in (ir.DataType.INT32, ir.DataType.INT64)
