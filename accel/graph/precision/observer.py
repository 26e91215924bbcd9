"""Measures every float value of a graph while it runs: reductions are appended, so that only scalars leave it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from accel.graph.precision.formats import FLOAT, FP16, FP32

PREFIX = "probe"
INTEGER = ir.DataType.INT32
# Elements are counted up to each of these magnitudes; from one to the next, FP16 treats them alike.
BOUNDS = (
    0.0,
    FP16.vanishes,
    float(np.nextafter(np.float32(FP16.smallest), np.float32(0))),
    float(np.nextafter(np.float32(FP16.overflows), np.float32(0))),
    FP32.largest,
)
COUNTS = tuple(f"{PREFIX}.count.{number}" for number in range(len(BOUNDS)))
OUTPUTS = (*(f"{PREFIX}.{name}" for name in ("largest", "smallest", "place", "elements")), *COUNTS)


@dataclass
class ValueStatistics:
    """What a value was seen to hold.

    `largest` and `smallest` non-zero magnitude; how many `elements`, and of those how many are NaN or infinite, how
    many FP16 would make infinite (`overflow`), give fewer digits (`subnormal`) or make zero (`vanishing`). `source`:
    the batch that held the largest and, where the first axis is the batch, the row in it. `reached`: largest and
    smallest after so many batches, at a few numbers of batches, so that growth shows.
    """

    largest: float = 0.0
    smallest: float = float("inf")
    not_finite: int = 0
    elements: int = 0
    overflow: int = 0
    subnormal: int = 0
    vanishing: int = 0
    source: tuple[int, int | None] | None = None
    reached: list[tuple[int, float, float]] = field(default_factory=list)

    def widen(self, other: "ValueStatistics") -> None:
        """Take in what was seen elsewhere."""
        if self.source is None or other.largest > self.largest:
            self.source = other.source
        self.largest = max(self.largest, other.largest)
        self.smallest = min(self.smallest, other.smallest)
        for name in ("not_finite", "elements", "overflow", "subnormal", "vanishing"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def mark(self, batches: int) -> None:
        """Note how far the value reached in the first `batches` batches."""
        self.reached.append((batches, self.largest, self.smallest))

    def seen_with(self, rows: Sequence[Sequence[str]]) -> str:
        """What the model was given when the value held its largest. `rows`: what each row of each batch was."""
        if self.source is None:
            return ""
        batch, row = self.source
        return rows[batch][row] if row is not None else f"batch {batch + 1}"

    def growth(self) -> float:
        """By which factor the newest batches raised the largest magnitude, 1 or more."""
        if len(self.reached) < 2:
            return 1.0
        before, largest = self.reached[-2][1], self.reached[-1][1]
        return largest / before if before and np.isfinite(largest) else 1.0


def infer_types(model: ir.Model) -> None:
    """In place: give every value its type, and its shape where nothing says it yet; shapes that are known stay.

    Operators that the ONNX specification lacks are passed over: who makes such a node notes its types. Weights are set
    aside meanwhile: inference would copy them.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs if value.name]
    if any(value.dtype is None or value.shape is None for value in values):
        known = [
            (value, value.shape) for value in values if value.shape is not None and not value.shape.has_unknown_dim()
        ]
        ShapeInferencePass(strict_mode=False)(model)
        for value, shape in known:
            value.shape = shape


def float_values(graph: ir.Graph) -> list[ir.Value]:
    """The FP32 inputs and node outputs of a graph, subgraphs aside, and what is computed from weights alone."""
    fixed = {node for node in graph if node.inputs and all(value and value.is_initializer() for value in node.inputs)}
    values = [*graph.inputs, *(output for node in graph if node not in fixed for output in node.outputs)]
    return [value for value in values if value.dtype == FLOAT and value.name]


def insert_observers(model: ir.Model) -> list[str]:
    """In place: append `OUTPUTS`, vectors with one element for each returned value name, in that order.

    A zero is added to the elements of each value: a maximum over nothing is not defined, and values may be empty.
    """
    infer_types(model)
    graph = model.graph
    values = float_values(graph)
    flat = _constant(graph, "flat", np.array([-1], np.int64))
    axis = _constant(graph, "axis", np.array([0], np.int64))
    zero = _constant(graph, "zero", np.zeros((), np.float32))
    one_zero = _constant(graph, "one_zero", np.zeros(1, np.float32))
    huge = _constant(graph, "huge", np.array(np.inf, np.float32))
    bounds = [_constant(graph, f"bound.{i}", np.array(bound, np.float32)) for i, bound in enumerate(BOUNDS)]
    columns: dict[str, list[ir.Value]] = {name: [] for name in OUTPUTS}
    largest, smallest, place, elements = OUTPUTS[:4]
    for value in values:
        elements_of = _append(graph, "Concat", [_append(graph, "Reshape", [value, flat]), one_zero], axis=0)
        size = _append(graph, "Abs", [elements_of])  # [elements + 1]
        nonzero = _append(graph, "Where", [_append(graph, "Greater", [size, zero]), size, huge])
        columns[largest].append(_append(graph, "ReduceMax", [size, axis]))
        columns[smallest].append(_append(graph, "ReduceMin", [nonzero, axis]))
        columns[place].append(_append(graph, "ArgMax", [size], axis=0))
        columns[elements].append(_append(graph, "Shape", [size]))
        for name, bound in zip(COUNTS, bounds, strict=True):  # one after the other: fewer live at a time
            within = _append(graph, "LessOrEqual", [size, bound])
            columns[name].append(_append(graph, "ReduceSum", [_append(graph, "Cast", [within], to=INTEGER), axis]))
    for name, column in columns.items():
        output = _append(graph, "Concat", column, axis=0)
        kind = FLOAT if name in (largest, smallest) else ir.DataType.INT64 if name in (place, elements) else INTEGER
        output.name, output.type, output.shape = name, ir.TensorType(kind), ir.Shape([len(values)])
        graph.outputs.append(output)
    return [value.name or "" for value in values]


def by_row(model: ir.Model) -> set[str]:
    """The values whose first axis is the batch."""
    batch = next((value.shape[0] for value in model.graph.inputs if value.shape and value.shape.rank()), None)
    return {
        value.name or ""
        for value in float_values(model.graph)
        if isinstance(batch, ir.SymbolicDim)
        and value.shape is not None
        and value.shape.rank()
        and value.shape[0] == batch
    }


def read_observers(
    names: Sequence[str], columns: Iterable[np.ndarray], rows: Collection[str] = (), batch: tuple[int, int] = (0, 1)
) -> dict[str, ValueStatistics]:
    """The vectors of one run -> a range for each value. `batch`: its number, and how many rows it has."""
    found = {}
    number, height = batch
    for name, (largest, smallest, place, elements, *counts) in zip(
        names, zip(*(column.tolist() for column in columns), strict=True), strict=True
    ):
        zeros, vanishing, subnormal, fitting, finite = counts
        largest = float("inf") if largest != largest else largest  # NaN: whatever the reduction made of it
        real = elements - 1
        row = place // (real // height) if name in rows and real > 0 and real % height == 0 and place < real else None
        found[name] = ValueStatistics(
            largest,
            smallest,
            elements - finite,
            real,
            overflow=finite - fitting,
            subnormal=subnormal - vanishing,
            vanishing=vanishing - zeros,
            source=(number, row),
        )
    return found


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], **attributes: int | ir.DataType) -> ir.Value:
    node = ir.node(op, inputs, attributes={name: int(value) for name, value in attributes.items()})
    node.outputs[0].name = f"{PREFIX}.{graph.num_nodes()}"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    value = ir.val(f"{PREFIX}.{name}", const_value=ir.tensor(content, name=f"{PREFIX}.{name}"))
    graph.register_initializer(value)
    return value
