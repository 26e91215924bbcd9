"""Observers, which measure every float value of a graph while it runs, and the calibration statistics they collect.

Observers are reductions appended to the graph, so that only a few scalars per value leave it.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from accel.graph.build import add_initializer, add_node
from accel.graph.precision.formats import FLOAT, FP16, FP32

PREFIX = "observer"
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
# Elements are counted up to each of these magnitudes. Between two of them, rounding to FP16 treats elements alike.
BOUNDS = (
    0.0,
    FP16.underflow_threshold,
    float(np.nextafter(np.float32(FP16.smallest), np.float32(0))),
    float(np.nextafter(np.float32(FP16.overflow_threshold), np.float32(0))),
    FP32.largest,
)
LARGEST, SMALLEST, INDEX, ELEMENTS = (f"{PREFIX}.{name}" for name in ("largest", "smallest", "index", "elements"))
COUNTS = tuple(f"{PREFIX}.count.{number}" for number in range(len(BOUNDS)))
# Graph outputs that `insert_observers` appends, and their types.
OUTPUT_TYPES = {LARGEST: FLOAT, SMALLEST: FLOAT, INDEX: INT64, ELEMENTS: INT64} | dict.fromkeys(COUNTS, INT32)
OUTPUTS = tuple(OUTPUT_TYPES)


@dataclass
class ValueStatistics:
    """Calibration statistics of one value.

    Attributes:
        largest: Largest magnitude.
        smallest: Smallest magnitude other than zero.
        not_finite: Number of elements that are NaN or infinite.
        elements: Number of elements.
        overflow: Number of finite elements that become infinite in FP16.
        subnormal: Number of elements that become subnormal in FP16, with fewer significant digits.
        vanishing: Number of elements other than zero that become zero in FP16.
        source: Batch with the largest magnitude, and the row in it where the value's first axis is the batch.
        reached: (number of batches, largest, smallest) after some numbers of batches: see `mark`.
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
        """Merge the statistics of another run of the same graph into these, except `reached`."""
        if self.source is None or other.largest > self.largest:
            self.source = other.source
        self.largest = max(self.largest, other.largest)
        self.smallest = min(self.smallest, other.smallest)
        self.not_finite += other.not_finite
        self.elements += other.elements
        self.overflow += other.overflow
        self.subnormal += other.subnormal
        self.vanishing += other.vanishing

    def mark(self, batches: int) -> None:
        """Append the current extremes to `reached`, as those of the first `batches` batches."""
        self.reached.append((batches, self.largest, self.smallest))

    def seen_with(self, rows: Sequence[Sequence[str]]) -> str:
        """Return the description of the model input for which the value was largest.

        Args:
            rows: Description of each row of each batch, such as "text 3: hello".
        """
        if self.source is None:
            return ""
        batch, row = self.source
        return rows[batch][row] if row is not None else f"batch {batch + 1}"

    def growth(self) -> float:
        """Return the factor, 1 or more, by which the batches between the last two calls of `mark` raised `largest`."""
        if len(self.reached) < 2:
            return 1.0
        before, largest = self.reached[-2][1], self.reached[-1][1]
        return largest / before if before and np.isfinite(largest) else 1.0


def infer_types(model: ir.Model) -> None:
    """Infer missing types and shapes of all values, in place. Shapes that are fully known stay.

    Outputs of operators that ONNX doesn't define get no type: the pass that creates such a node must set it. ONNX's
    inference works on a copy of the graph without the weights' content, see `ShapeInferencePass`.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs if value.name]
    if not any(value.dtype is None or value.shape is None for value in values):
        return
    known_shapes = {
        value: value.shape for value in values if value.shape is not None and not value.shape.has_unknown_dim()
    }
    ShapeInferencePass(strict_mode=False)(model)
    for value, shape in known_shapes.items():
        value.shape = shape


def float_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the FP32 inputs and node outputs of a graph.

    Values in subgraphs are not among them, nor outputs of nodes that read initializers alone.
    """
    values: list[ir.Value] = list(graph.inputs)
    for node in graph:
        constant = bool(node.inputs) and all(value and value.is_initializer() for value in node.inputs)
        if not constant:
            values += node.outputs
    return [value for value in values if value.dtype == FLOAT and value.name]


def insert_observers(model: ir.Model) -> list[str]:
    """Append observers of all float values to the main graph, in place, with `OUTPUTS` as additional graph outputs.

    Returns:
        Names of the observed values. Each of the additional outputs is a vector with one element per name.
    """
    infer_types(model)
    graph = model.graph
    values = float_values(graph)
    observer = _Observer(graph)
    columns: dict[str, list[ir.Value]] = {name: [] for name in OUTPUTS}
    for value in values:
        for name, scalar in observer.measure(value).items():
            columns[name].append(scalar)
    for name, column in columns.items():
        output = add_node(
            graph,
            "Concat",
            column,
            name,
            attributes={"axis": 0},
            dtype=OUTPUT_TYPES[name],
            shape=ir.Shape([len(values)]),
        )
        graph.outputs.append(output)
    return [value.name or "" for value in values]


class _Observer:
    """Reductions appended to one graph, and the constants that they share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.flat = self._constant("flat", np.array([-1], np.int64))
        self.axis = self._constant("axis", np.array([0], np.int64))
        self.zero = self._constant("zero", np.zeros((), np.float32))
        self.padding = self._constant("padding", np.zeros(1, np.float32))
        self.infinity = self._constant("infinity", np.array(np.inf, np.float32))
        self.bounds = [
            self._constant(f"bound.{number}", np.array(bound, np.float32)) for number, bound in enumerate(BOUNDS)
        ]

    def measure(self, value: ir.Value) -> dict[str, ir.Value]:
        """Append the nodes that measure `value`, and return a vector of one element for each of `OUTPUTS`."""
        flat = self._node("Reshape", [value, self.flat])
        # A zero more than the value has: it may be empty, and the maximum of no elements is undefined.
        padded = self._node("Concat", [flat, self.padding], axis=0)
        magnitude = self._node("Abs", [padded])  # [elements + 1]
        is_nonzero = self._node("Greater", [magnitude, self.zero])
        nonzero = self._node("Where", [is_nonzero, magnitude, self.infinity])
        results = {
            LARGEST: self._node("ReduceMax", [magnitude, self.axis]),
            SMALLEST: self._node("ReduceMin", [nonzero, self.axis]),
            INDEX: self._node("ArgMax", [magnitude], axis=0),
            ELEMENTS: self._node("Shape", [magnitude]),
        }
        for name, bound in zip(COUNTS, self.bounds, strict=True):
            # Reduced one by one, so that a runtime can free each mask before it computes the next.
            within = self._node("LessOrEqual", [magnitude, bound])
            results[name] = self._node("ReduceSum", [self._node("Cast", [within], to=int(INT32)), self.axis])
        return results

    def _node(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        """Append a node and return its output."""
        return add_node(self.graph, op_type, inputs, f"{PREFIX}.{self.graph.num_nodes()}", attributes=attributes)

    def _constant(self, name: str, content: np.ndarray) -> ir.Value:
        """Register an initializer."""
        return add_initializer(self.graph, f"{PREFIX}.{name}", content)


def batch_first_values(model: ir.Model) -> set[str]:
    """Return the names of the float values whose first axis is the batch: the first axis of the first graph input."""
    batch = next((value.shape[0] for value in model.graph.inputs if value.shape and value.shape.rank()), None)
    if not isinstance(batch, ir.SymbolicDim):
        return set()
    names = set()
    for value in float_values(model.graph):
        if value.shape is not None and value.shape.rank() and value.shape[0] == batch:
            names.add(value.name or "")
    return names


def read_observers(
    names: Sequence[str],
    columns: Iterable[np.ndarray],
    batch_first: Collection[str] = (),
    batch: tuple[int, int] = (0, 1),
) -> dict[str, ValueStatistics]:
    """Return the statistics of one run of a graph with observers, by value name.

    Args:
        names: Names of the observed values, as `insert_observers` returned them.
        columns: Contents of the graph outputs `OUTPUTS`, in that order.
        batch_first: Names of the values whose first axis is the batch.
        batch: Number of the batch, and how many rows it has.
    """
    results = dict(zip(OUTPUTS, (column.tolist() for column in columns), strict=True))
    number, rows = batch
    statistics = {}
    for position, name in enumerate(names):
        largest = results[LARGEST][position]
        index = results[INDEX][position]
        padded_elements = results[ELEMENTS][position]
        # Number of elements up to each of `BOUNDS`; the zero that observers append is one of the zeros.
        zeros, to_vanishing, to_subnormal, to_overflow, finite = (results[count][position] for count in COUNTS)
        elements = padded_elements - 1
        row = None
        if name in batch_first and elements > 0 and elements % rows == 0 and index < elements:
            row = index // (elements // rows)
        statistics[name] = ValueStatistics(
            largest=math.inf if math.isnan(largest) else largest,
            smallest=results[SMALLEST][position],
            not_finite=padded_elements - finite,
            elements=elements,
            overflow=finite - to_overflow,
            subnormal=to_subnormal - to_vanishing,
            vanishing=to_vanishing - zeros,
            source=(number, row),
        )
    return statistics
