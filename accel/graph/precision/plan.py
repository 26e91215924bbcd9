"""Decides which nodes stay in FP32, and why, from what each value was seen to hold.

The rest is lowered to a format of 16 bits, FP16 or bfloat16, whose limits the rules ask for:

- Overflow counts everywhere: a node stays if a value it reads or writes, weights included, comes within the margin of
  the format's largest number.
- Underflow counts only where zero or a lost digit changes the result: what is divided by, taken the logarithm or the
  root of, and the sums that lead there. Elsewhere an element near zero may well become zero. A fused norm has no such
  values: it computes in FP32 inside (see `fuse_norms` and `fuse_skip_norm`), and only what goes in and out counts.
- A float that becomes an integer or a truth value by way of arithmetic on positions stays: rounding would change it.
- What FP32 itself can't hold (a logarithm of zero that a later `Where` discards) stays as it is.
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

ANY_TYPE = frozenset({"Cast", "Shape", "Size"})  # read a value of either precision as it is
ROOTS = frozenset({"Sqrt", "Reciprocal", "Log"})  # zero in, or a digit lost, changes everything that follows
SUMS = frozenset({"Add", "ReduceMean", "ReduceSum", "Sqrt", "Mean", "Sum"})  # what a norm adds up before its root


# Rules that go by what was seen; a trial may find them too careful.
OVERFLOW, UNDERFLOW, NOT_FINITE = "overflow", "underflow", "infinity in FP32 as well"
# Rules that hold whatever the numbers are.
INTEGER = "rounding that would change an integer"
NO_OPERATOR, SUBGRAPH = "no such operator in 16 bits", "a subgraph"
CASTS = "fewer casts"  # added by `borders`


@dataclass(frozen=True)
class Reason:
    """Why a node stays in FP32: the rule, the value that it is about, and what that was seen to hold."""

    rule: str
    value: str
    largest: float | None = None
    smallest: float | None = None


@dataclass
class Plan:
    """What one graph keeps in FP32. Nodes are named by their first output, which is unique in a graph.

    `dropped`: the nodes that the rules would keep, but that trials showed to be safe in 16 bits.
    """

    nodes: dict[str, Reason] = field(default_factory=dict)
    weights: dict[str, Reason] = field(default_factory=dict)
    specs: dict[str, Reason] = field(default_factory=dict)
    dropped: dict[str, Reason] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Plan":
        return cls(**{kind: {name: Reason(**why) for name, why in found.items()} for kind, found in values.items()})


def is_mask(value: ir.Value, format: Format) -> bool:
    """A scalar at or beyond the format's most negative number: it stands for minus infinity in a mask."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or tensor.dtype != FLOAT:
        return False
    return float(tensor.numpy().reshape(())) <= -format.largest


def clamp_masks(model: ir.Model, format: Format = FP16) -> None:
    """In place: let masks add what the format can hold, so that they don't count as overflow."""
    for value in model.graph.initializers.values():
        if is_mask(value, format) and value.const_value is not None:
            shape = value.const_value.shape.numpy()
            value.const_value = ir.tensor(np.full(shape, format.mask, np.float32), name=value.name)


def make_plan(
    model: ir.Model, statistics: Mapping[str, ValueStatistics], overflow_margin: float, format: Format = FP16
) -> Plan:
    """The plan for a graph whose masks are clamped. `ranges`: value name -> what it held; `margin` >= 1, a factor."""
    graph = model.graph
    plan = Plan()
    beyond = {
        name: reason
        for name, held in statistics.items()
        if (reason := _beyond(name, held, overflow_margin, format)) is not None
    }
    for value in graph.initializers.values():
        if (reason := _weight(value, format)) is not None:
            beyond[value.name or ""] = plan.weights[value.name or ""] = reason
    low = _underflows(graph, statistics, overflow_margin, format)
    positions = _position_arithmetic(graph)
    for node in graph:
        name = node.outputs[0].name or ""
        touched = [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]
        if node.op_type not in ANY_TYPE or node.outputs[0].dtype == FLOAT:
            # What is so whatever the numbers are comes first: no trial may drop it.
            reason = positions.get(name) or _no_kernel(node, model.opset_imports, format)
            reason = reason or next((beyond[value] for value in touched if value in beyond), None) or low.get(name)
            if reason is not None and has_float(node):
                plan.nodes[name] = reason
    for value in (*graph.inputs, *graph.outputs):
        if value.name in beyond:
            plan.specs[value.name or ""] = beyond[value.name or ""]
    _keep_captured(graph, plan)
    return plan


def least_plan(model: ir.Model, format: Format = FP16) -> Plan:
    """Only what can't be lowered at all: the mix that converters make when they look at no numbers."""
    plan = Plan()
    for node in model.graph:
        if has_float(node) and (reason := _no_kernel(node, model.opset_imports, format)) is not None:
            plan.nodes[node.outputs[0].name or ""] = reason
    _keep_captured(model.graph, plan)
    return plan


def _keep_captured(graph: ir.Graph, plan: Plan) -> None:
    """The nodes below a control-flow operator are left alone, so what they read from outside stays in FP32 as well."""
    for value in set().union(*analyze_implicit_usage(graph).values()):
        if value.graph is graph and value.dtype == FLOAT:
            producer, reason = value.producer(), Reason(SUBGRAPH, value.name or "")
            if producer is not None:
                plan.nodes.setdefault(producer.outputs[0].name or "", reason)
            else:
                (plan.weights if value.is_initializer() else plan.specs).setdefault(value.name or "", reason)


def _beyond(name: str, held: ValueStatistics, overflow_margin: float, format: Format) -> Reason | None:
    if held.not_finite:
        return Reason(NOT_FINITE, name, held.largest, held.smallest)
    if held.largest * overflow_margin > format.largest:
        return Reason(OVERFLOW, name, held.largest, held.smallest)
    return None


def _weight(value: ir.Value, format: Format) -> Reason | None:
    tensor = value.const_value
    if tensor is None or tensor.dtype != FLOAT or tensor.size == 0:
        return None
    content = tensor.numpy()
    largest = max(float(content.max()), -float(content.min()))
    if isinstance(tensor, ir.ExternalTensor):
        del content
        tensor.release()  # or the mapped pages of every weight would count as this process's memory
    return None if largest <= format.largest else Reason(OVERFLOW, value.name or "", largest)


def _underflows(
    graph: ir.Graph, statistics: Mapping[str, ValueStatistics], overflow_margin: float, format: Format
) -> dict[str, Reason]:
    """Nodes around a root or divisor that comes too near zero, back to the elements that are summed up."""
    found: dict[str, Reason] = {}

    def keep(node: ir.Node | None, reason: Reason) -> None:
        if node is None or (node.outputs[0].name or "") in found:
            return
        found[node.outputs[0].name or ""] = reason
        if node.op_type in SUMS:
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                # Past the sum, one node more: the squares, whose elements must not vanish before they are added.
                if producer is not None and node.op_type.startswith("Reduce"):
                    found.setdefault(producer.outputs[0].name or "", reason)
                elif producer is not None and producer.op_type in SUMS:
                    keep(producer, reason)

    for node in graph:
        watched: list[ir.Value | None] = []
        if node.op_type in ROOTS:
            watched = [node.inputs[0], node.outputs[0]]
        elif node.op_type in ("Div", "Pow"):
            watched = [node.inputs[1 if node.op_type == "Div" else 0]] if _divides(node) else []
        for value in watched:
            held = statistics.get(value.name or "") if value is not None else None
            if value is not None and held is not None and held.smallest < format.smallest * overflow_margin:
                reason = Reason(UNDERFLOW, value.name or "", held.largest, held.smallest)
                keep(node, reason)
                keep(value.producer(), reason)
                for user in value.consumers():
                    keep(user, reason)
    return found


def _divides(node: ir.Node) -> bool:
    if node.op_type == "Div":
        return True
    exponent = node.inputs[1].const_value if node.inputs[1] is not None else None
    return exponent is None or bool((exponent.numpy() < 0).any())


def _position_arithmetic(graph: ir.Graph) -> dict[str, Reason]:
    """Float nodes between integers and integers (or truth values), such as T5's logarithmic distance buckets."""
    from_integers: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        steady = (value.const_value is not None and value.const_value.size == 1 for value in inputs)
        if all(
            scalar or value.dtype != FLOAT or value in from_integers
            for value, scalar in zip(inputs, steady, strict=True)
        ):
            from_integers.update(output for output in node.outputs if output.dtype == FLOAT)
    found: dict[str, Reason] = {}
    frontier = [
        value
        for node in graph
        if node.outputs[0].dtype not in (FLOAT, None) and node.op_type not in ("Shape", "Size")
        for value in node.inputs
        if value in from_integers
    ]
    while frontier:
        value = frontier.pop()
        producer = value.producer() if value is not None else None
        if value is not None and producer is not None and (value.name or "") not in found:
            found[value.name or ""] = Reason(INTEGER, value.name or "")
            frontier += [other for other in producer.inputs if other in from_integers]
    return found


def _no_kernel(node: ir.Node, opsets: Mapping[str, int], format: Format) -> Reason | None:
    """An operator whose specification lacks the format, or one with subgraphs, which are left alone."""
    if has_subgraph(node):
        return Reason(SUBGRAPH, node.outputs[0].name or "")
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return None  # a runtime's own operators publish no schema here; those in FP32 exist in 16 bits
    schema = onnx.defs.get_schema(node.op_type, opsets.get("", 20))
    allowed = {kind for constraint in schema.type_constraints for kind in constraint.allowed_type_strs}
    return None if f"tensor({format.name})" in allowed else Reason(NO_OPERATOR, node.outputs[0].name or "")


def has_float(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == FLOAT for value in (*node.inputs, *node.outputs))


def unite(plans: Mapping[Any, Plan], models: Mapping[Any, ir.Model], inputs: Mapping[str, str]) -> None:
    """In place: plans of graphs that share weights and caches agree, so that every weight and cache has one type.

    A weight that a kept node reads is kept everywhere, and with it the nodes that read it. `feeds`: input -> output
    that feeds it at the next step.
    """
    before = None
    while before != (before := sum(len(plan.nodes) + len(plan.weights) + len(plan.specs) for plan in plans.values())):
        for key, model in models.items():
            for node in model.graph:
                why = plans[key].nodes.get(node.outputs[0].name or "")
                for value in node.inputs:
                    if why is not None and value is not None and is_weight(value):
                        for plan in plans.values():
                            plan.weights.setdefault(value.name or "", why)
        for key, model in models.items():
            for name, why in plans[key].weights.items():
                value = model.graph.initializers.get(name)
                for user in value.consumers() if value is not None else ():
                    if has_float(user):
                        plans[key].nodes.setdefault(user.outputs[0].name or "", why)
        specs = {name: why for plan in plans.values() for name, why in plan.specs.items()}
        for given, made in inputs.items():
            why = specs.get(given) or specs.get(made)
            if why is not None:
                specs |= {given: why, made: why}
        for plan in plans.values():
            plan.specs.update(specs)


def is_weight(value: ir.Value) -> bool:
    """An FP32 initializer large enough that a second copy of it, in another type, would cost something."""
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.dtype == FLOAT and tensor.size > 16
