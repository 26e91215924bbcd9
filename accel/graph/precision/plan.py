"""Precision plans: which nodes stay in FP32, and why, decided from calibration statistics.

All other nodes are lowered to a 16-bit format, FP16 or bfloat16. The rules compare the statistics with its limits:

- Overflow matters everywhere: a node stays in FP32 if a value that it reads or writes, weights included, comes within
  the overflow margin of the format's largest number.
- Underflow matters only where a zero, or a loss of significant digits, changes the result: divisors, operands of
  logarithms and square roots, and the sums that compute those. Elsewhere elements near zero may become zero. A fused
  norm has no such values: it computes in FP32 internally (see `fuse_norms` and `fuse_skip_norm`), so only its inputs
  and outputs matter.
- Float arithmetic between integers (positions) and an integer or boolean result stays in FP32: rounding would change
  the result.
- Angles, which sines and cosines read, stay in FP32 with the arithmetic that computes them: a position of 2,000 times a
  frequency is rounded to a multiple of 1 in FP16, which is an error of half a radian. Calibration on short inputs would
  not show it.
- Values that are not finite in FP32 either (a logarithm of zero that a later `Where` discards) stay in FP32.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage

from accel.graph.control import has_subgraph
from accel.graph.precision.formats import FLOAT, FP16, Format
from accel.graph.precision.observer import ValueStatistics
from accel.graph.weights import tensor_content

ANY_TYPE = frozenset({"Cast", "Shape", "Size"})  # operators that read FP32 and 16-bit values alike, without a cast
ROOTS = frozenset({"Sqrt", "Reciprocal", "Log"})  # steep near zero: a small error of the operand becomes a large one
TRIGONOMETRIC = ("Sin", "Cos")
SUMS = frozenset({"Add", "ReduceMean", "ReduceSum", "Sqrt", "Mean", "Sum"})  # operators of a norm up to its root
WEIGHT_ELEMENTS = 16  # an initializer with more elements than this counts as a weight, not as a constant

# Rules based on calibration statistics. Sensitivity trials may show that a node is safe in 16 bits all the same.
OVERFLOW, UNDERFLOW, NOT_FINITE = "overflow", "underflow", "infinity in FP32 as well"
# Rules that hold for any numbers.
INTEGER = "rounding that would change an integer"
ANGLE = "rounding that would turn an angle"
NO_OPERATOR, SUBGRAPH = "no such operator in 16 bits", "a subgraph"
CASTS = "fewer casts"  # added by `minimize_casts`


@dataclass(frozen=True)
class Reason:
    """Why a node, weight, input or output stays in FP32.

    Attributes:
        rule: Rule that applied, such as `OVERFLOW`.
        value: Name of the value that the rule applied to.
        largest: Largest magnitude of that value during calibration, if the rule depends on it.
        smallest: Smallest magnitude other than zero, likewise.
    """

    rule: str
    value: str
    largest: float | None = None
    smallest: float | None = None


@dataclass
class Plan:
    """Parts of one graph that stay in FP32, each with its reason.

    Attributes:
        nodes: Nodes, by the name of their first output, which is unique in a graph: see `node_key`.
        weights: Initializers, by name.
        specs: Graph inputs and outputs, by name.
        dropped: Nodes that the rules would keep in FP32, but that trials showed to be safe in 16 bits.
    """

    nodes: dict[str, Reason] = field(default_factory=dict)
    weights: dict[str, Reason] = field(default_factory=dict)
    specs: dict[str, Reason] = field(default_factory=dict)
    dropped: dict[str, Reason] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """Return the plan as JSON-serialisable dictionaries."""
        return asdict(self)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan that `dump` returned as `values`."""
        parts = {}
        for part, reasons in values.items():
            parts[part] = {name: Reason(**reason) for name, reason in reasons.items()}
        return cls(**parts)


def node_key(node: ir.Node) -> str:
    """Return the name by which plans refer to a node: that of its first output."""
    return node.outputs[0].name or ""


def has_float(node: ir.Node) -> bool:
    """Return whether the node reads or writes an FP32 value."""
    return any(value is not None and value.dtype == FLOAT for value in (*node.inputs, *node.outputs))


def is_weight(value: ir.Value) -> bool:
    """Return whether `value` is an FP32 initializer so large that a second copy in another type would cost memory."""
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.dtype == FLOAT and tensor.size > WEIGHT_ELEMENTS


def is_mask(value: ir.Value, format: Format) -> bool:
    """Return whether `value` is a scalar at or below the format's most negative number: minus infinity in a mask."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or tensor.dtype != FLOAT:
        return False
    return float(tensor.numpy().reshape(())) <= -format.largest


def clamp_masks(model: ir.Model, format: Format = FP16) -> None:
    """Clamp the constants of attention masks to `format.mask_value`, in place, so that they don't count as overflow."""
    for value in model.graph.initializers.values():
        if is_mask(value, format) and value.const_value is not None:
            shape = value.const_value.shape.numpy()
            value.const_value = ir.tensor(np.full(shape, format.mask_value, np.float32), name=value.name)


def make_plan(
    model: ir.Model, statistics: Mapping[str, ValueStatistics], overflow_margin: float, format: Format = FP16
) -> Plan:
    """Return the plan that the rules give for one graph.

    Args:
        model: FP32 graph with known types, its masks clamped by `clamp_masks`; not changed.
        statistics: Calibration statistics, by value name. Values without statistics are not checked.
        overflow_margin: Factor of at least 1 by which magnitudes may exceed those of the calibration.
        format: Format that the other nodes are lowered to.
    """
    graph = model.graph
    plan = Plan()
    overflows: dict[str, Reason] = {}
    for name, value_statistics in statistics.items():
        reason = _overflow(name, value_statistics, overflow_margin, format)
        if reason is not None:
            overflows[name] = reason
    for value in graph.initializers.values():
        reason = _weight_overflow(value, format)
        if reason is not None:
            overflows[value.name or ""] = reason
            plan.weights[value.name or ""] = reason
    underflows = _underflows(graph, statistics, overflow_margin, format)
    exact = _angle_arithmetic(graph) | _position_arithmetic(graph)
    for node in graph:
        if not has_float(node) or (node.op_type in ANY_TYPE and node.outputs[0].dtype != FLOAT):
            continue
        # Rules that hold for any numbers come first: a node that one of them keeps is never dropped by trials.
        reason = (
            exact.get(node_key(node))
            or _unsupported(node, model.opset_imports, format)
            or _first_overflow(node, overflows)
            or underflows.get(node_key(node))
        )
        if reason is not None:
            plan.nodes[node_key(node)] = reason
    for value in (*graph.inputs, *graph.outputs):
        if value.name in overflows:
            plan.specs[value.name or ""] = overflows[value.name or ""]
    _keep_subgraph_inputs(graph, plan)
    return plan


def least_plan(model: ir.Model, format: Format = FP16) -> Plan:
    """Return the plan that keeps only what can't be lowered at all, as converters do that use no statistics."""
    plan = Plan()
    for node in model.graph:
        reason = _unsupported(node, model.opset_imports, format)
        if reason is not None and has_float(node):
            plan.nodes[node_key(node)] = reason
    _keep_subgraph_inputs(model.graph, plan)
    return plan


def _keep_subgraph_inputs(graph: ir.Graph, plan: Plan) -> None:
    """Keep outer values that subgraphs read in FP32: nodes inside subgraphs are not converted."""
    for value in set().union(*analyze_implicit_usage(graph).values()):
        if value.graph is not graph or value.dtype != FLOAT:
            continue
        name, producer = value.name or "", value.producer()
        reason = Reason(SUBGRAPH, name)
        if producer is not None:
            plan.nodes.setdefault(node_key(producer), reason)
        elif value.is_initializer():
            plan.weights.setdefault(name, reason)
        else:
            plan.specs.setdefault(name, reason)


def _overflow(name: str, statistics: ValueStatistics, overflow_margin: float, format: Format) -> Reason | None:
    """Return why a value is outside the format's range, or None if it is within."""
    if statistics.not_finite:
        return Reason(NOT_FINITE, name, statistics.largest, statistics.smallest)
    if statistics.largest * overflow_margin > format.largest:
        return Reason(OVERFLOW, name, statistics.largest, statistics.smallest)
    return None


def _weight_overflow(value: ir.Value, format: Format) -> Reason | None:
    """Return the reason for an initializer with elements outside the format's range, else None."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != FLOAT or tensor.size == 0:
        return None
    elements = tensor_content(tensor)
    largest = max(float(elements.max()), -float(elements.min()))
    return None if largest <= format.largest else Reason(OVERFLOW, value.name or "", largest)


def _first_overflow(node: ir.Node, overflows: Mapping[str, Reason]) -> Reason | None:
    """Return the reason of the first input or output of `node` that is outside the format's range."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and (value.name or "") in overflows:
            return overflows[value.name or ""]
    return None


def _underflows(
    graph: ir.Graph, statistics: Mapping[str, ValueStatistics], overflow_margin: float, format: Format
) -> dict[str, Reason]:
    """Return the nodes around each root or division whose operand comes too near zero, by `node_key`.

    These are the root or division itself, the nodes that read or compute its operand, and the sums before those.
    """
    kept: dict[str, Reason] = {}
    for node in graph:
        for value in _sensitive_to_zero(node):
            seen = statistics.get(value.name or "")
            if seen is not None and seen.smallest < format.smallest * overflow_margin:
                reason = Reason(UNDERFLOW, value.name or "", seen.largest, seen.smallest)
                for neighbour in (node, value.producer(), *value.consumers()):
                    _keep_with_sums(neighbour, reason, kept)
    return kept


def _sensitive_to_zero(node: ir.Node) -> list[ir.Value]:
    """Return the inputs and outputs of `node` at which a zero or lost digits change the result."""
    values: list[ir.Value | None] = []
    if node.op_type in ROOTS:
        values = [node.inputs[0], node.outputs[0]]
    elif node.op_type == "Div":
        values = [node.inputs[1]]
    elif node.op_type == "Pow" and _may_be_negative(node.inputs[1]):
        values = [node.inputs[0]]
    return [value for value in values if value is not None]


def _may_be_negative(exponent: ir.Value | None) -> bool:
    """Return whether an exponent is negative somewhere, or unknown."""
    tensor = exponent.const_value if exponent is not None else None
    return tensor is None or bool((tensor.numpy() < 0).any())


def _keep_with_sums(node: ir.Node | None, reason: Reason, kept: dict[str, Reason]) -> None:
    """Add `node` to `kept`; if it is a sum, also the sums that compute its operands, recursively."""
    if node is None or node_key(node) in kept:
        return
    kept[node_key(node)] = reason
    if node.op_type not in SUMS:
        return
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is None:
            continue
        if node.op_type.startswith("Reduce"):
            # The node before the reduction, such as the squares, whose elements must not vanish before they are added.
            kept.setdefault(node_key(producer), reason)
        elif producer.op_type in SUMS:
            _keep_with_sums(producer, reason, kept)


def _position_arithmetic(graph: ir.Graph) -> dict[str, Reason]:
    """Return the float nodes between integer inputs and an integer or boolean result, by `node_key`.

    An example is the logarithm of a distance from which T5 computes the index of a position bucket.
    """
    from_integers: set[ir.Value] = set()  # FP32 values computed from integers, booleans and scalar constants alone
    for node in graph:
        if all(value is None or _is_integer_or_scalar(value) or value in from_integers for value in node.inputs):
            from_integers.update(output for output in node.outputs if output.dtype == FLOAT)
    frontier: list[ir.Value] = []
    for node in graph:
        if node.outputs[0].dtype not in (FLOAT, None) and node.op_type not in ("Shape", "Size"):
            frontier += [value for value in node.inputs if value is not None and value in from_integers]
    reasons: dict[str, Reason] = {}
    while frontier:
        value = frontier.pop()
        name, producer = value.name or "", value.producer()
        if producer is not None and name not in reasons:
            reasons[name] = Reason(INTEGER, name)
            frontier += [operand for operand in producer.inputs if operand is not None and operand in from_integers]
    return reasons


def _angle_arithmetic(graph: ir.Graph) -> dict[str, Reason]:
    """Return the nodes that compute sines and cosines, and the float nodes before them, by `node_key`.

    Transformers computes the angles of rotary position embeddings in FP32, whatever the model's dtype.
    """
    reasons: dict[str, Reason] = {}
    frontier = [node for node in graph if node.op_type in TRIGONOMETRIC]
    while frontier:
        node = frontier.pop()
        if node_key(node) in reasons or node.outputs[0].dtype != FLOAT:
            continue
        reasons[node_key(node)] = Reason(ANGLE, node_key(node))
        producers = (value.producer() for value in node.inputs if value is not None)
        frontier += [producer for producer in producers if producer is not None]
    return reasons


def _is_integer_or_scalar(value: ir.Value) -> bool:
    """Return whether `value` isn't FP32, or is a constant of one element."""
    return value.dtype != FLOAT or (value.const_value is not None and value.const_value.size == 1)


def _unsupported(node: ir.Node, opset_imports: Mapping[str, int], format: Format) -> Reason | None:
    """Return why a node can't be lowered: it has subgraphs, or ONNX doesn't define its operator for the format."""
    if has_subgraph(node):
        return Reason(SUBGRAPH, node_key(node))
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return None  # ONNX Runtime's contrib operators have no schema here; those for FP32 exist for 16 bits as well
    schema = onnx.defs.get_schema(node.op_type, opset_imports.get("", 20))
    allowed = {kind for constraint in schema.type_constraints for kind in constraint.allowed_type_strs}
    return None if f"tensor({format.name})" in allowed else Reason(NO_OPERATOR, node_key(node))


def unite(plans: Mapping[Any, Plan], models: Mapping[Any, ir.Model], cache: Mapping[str, str]) -> None:
    """Extend the plans of graphs that share weights and caches, in place, until each of those has one type everywhere.

    A weight that a kept node reads stays in FP32 in all graphs, and so do all nodes that read it.

    Args:
        plans: Plan of each graph.
        models: Graphs, under the same keys.
        cache: Cache input -> output whose content becomes that input at the next decode step.
    """
    previous, current = -1, _plan_size(plans)
    while current != previous:
        _unite_weights(plans, models)
        _unite_specs(plans, cache)
        previous, current = current, _plan_size(plans)


def _plan_size(plans: Mapping[Any, Plan]) -> int:
    """Return the number of nodes, weights, inputs and outputs in all plans."""
    return sum(len(plan.nodes) + len(plan.weights) + len(plan.specs) for plan in plans.values())


def _unite_weights(plans: Mapping[Any, Plan], models: Mapping[Any, ir.Model]) -> None:
    """Keep the weights of kept nodes in all plans, and then all nodes that read them."""
    for key, model in models.items():
        for node in model.graph:
            reason = plans[key].nodes.get(node_key(node))
            for value in node.inputs:
                if reason is not None and value is not None and is_weight(value):
                    for plan in plans.values():
                        plan.weights.setdefault(value.name or "", reason)
    for key, model in models.items():
        for name, reason in plans[key].weights.items():
            weight = model.graph.initializers.get(name)
            for consumer in weight.consumers() if weight is not None else ():
                if has_float(consumer):
                    plans[key].nodes.setdefault(node_key(consumer), reason)


def _unite_specs(plans: Mapping[Any, Plan], cache: Mapping[str, str]) -> None:
    """Keep the same inputs and outputs in all plans, and each cache input together with its output."""
    specs: dict[str, Reason] = {}
    for plan in plans.values():
        specs.update(plan.specs)
    for past, present in cache.items():
        reason = specs.get(past) or specs.get(present)
        if reason is not None:
            specs[past] = specs[present] = reason
    for plan in plans.values():
        plan.specs.update(specs)
