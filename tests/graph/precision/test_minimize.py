"""Fewer nodes in FP32 and fewer casts, on graphs small enough to try every choice."""

from itertools import combinations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.emulate import emulate_half, round_values
from accel.graph.precision.formats import BF16, FP16, Format
from accel.graph.precision.minimize import droppable, groups, minimize_casts, without
from accel.graph.precision.observer import infer_types
from accel.graph.precision.plan import CASTS, INTEGER, OVERFLOW, UNDERFLOW, Plan, Reason
from tests.graph import text

BRANCHING = """
g (float[n, 5] x, float[n, 5] z) => (float[n, 5] y, float[n, 5] side) <float two = {2.0}> {
    a = Mul (x, two)
    b = Neg (a)
    c = Abs (b)
    d = Add (c, b)
    e = MatMul (d, w)
    f = Add (e, z)
    h = Relu (f)
    y = Add (h, a)
    side = Neg (f)
}
"""
NODES = ["a", "b", "c", "d", "e", "f", "h", "y", "side"]


def branching() -> ir.Model:
    model = text.parse(BRANCHING, {"w": text.numbers(5, 5)})
    infer_types(model)
    return model


def casts(kept: set[str]) -> float:
    """Casts of the graph with the nodes `kept` in FP32, and the weight if its reader is."""
    model = branching()
    why = Reason(OVERFLOW, "x")
    convert_half(model, Plan(dict.fromkeys(kept, why), {"w": why} if "e" in kept else {}))
    return half_share(model)["casts"]


@pytest.mark.parametrize(
    "kept", [{"a", "c"}, {"b"}, {"c", "f"}, {"a", "y"}, {"f", "y"}, {"e", "side"}, {"b", "d", "h"}]
)
def test_no_other_choice_costs_fewer_casts(kept: set[str]) -> None:
    """Against every set of nodes that holds those that must stay and leaves the product's weight where it is."""
    model = branching()
    why = Reason(OVERFLOW, "x")
    added = minimize_casts(model, Plan(dict.fromkeys(kept, why), {"w": why} if "e" in kept else {}))
    assert not kept & added.keys()
    assert {reason.rule for reason in added.values()} <= {CASTS}
    free = [name for name in NODES if name not in kept and name != "e"]
    choices = [kept | set(more) for count in range(len(free) + 1) for more in combinations(free, count)]
    least = min(casts(selector) for selector in choices)
    assert casts(kept | added.keys()) == least
    smallest = min(len(selector) for selector in choices if casts(selector) == least)
    assert len(kept | added.keys()) == smallest  # no more in FP32 than that takes


def test_a_node_between_two_islands_joins_them() -> None:
    """One node in 16 bits between two in FP32 costs two casts, and a sum of two results in FP32 one less than them."""
    assert minimize_casts(branching(), Plan(dict.fromkeys(("a", "c"), Reason(OVERFLOW, "x")))).keys() == {"b", "d"}
    assert minimize_casts(branching(), Plan()) == {}


@pytest.mark.parametrize("needed", [set(), {"3"}, {"0", "7"}, {"2", "3"}, set("01234567")])
def test_what_is_not_needed_is_dropped(needed: set[str]) -> None:
    """Eight groups of which some are needed: all others go, and nothing is dropped that was not tried together."""
    tried: list[set[str]] = []

    def passes(names: list[str]) -> bool:
        tried.append(set(names))
        return not needed & set(names)

    found = droppable([[str(number)] for number in range(8)], passes, trials=100)
    assert set(found) == set("01234567") - needed
    assert not found or set(found) in tried
    assert len(tried) <= 15


def test_trials_are_counted() -> None:
    """With too few to find the one that is needed, less is dropped, and all that is was tried."""
    calls: list[list[str]] = []

    def passes(names: list[str]) -> bool:
        calls.append(names)
        return "5" not in names

    found = droppable([[str(number)] for number in range(8)], passes, trials=3)
    assert len(calls) == 3
    assert found == ["0", "1", "2", "3"] == calls[1]


def test_nodes_are_dropped_by_what_keeps_them() -> None:
    """Those of one value go together, underflow first; a rule that holds whatever the numbers are is not tried."""
    plan = Plan(
        {
            "a": Reason(OVERFLOW, "x"),
            "b": Reason(OVERFLOW, "x"),
            "c": Reason(INTEGER, "c"),
            "d": Reason(UNDERFLOW, "d"),
            "e": Reason(OVERFLOW, "w"),
            "h": Reason(OVERFLOW, "h"),
        },
        weights={"w": Reason(OVERFLOW, "w")},
        specs={"x": Reason(OVERFLOW, "x"), "y": Reason(OVERFLOW, "h")},
    )
    assert groups(branching(), plan) == [["d"], ["a", "b"], ["h"]]
    smaller = without(branching(), plan, ["a", "b"])
    assert smaller.nodes.keys() == {"c", "d", "e", "h"}
    assert smaller.dropped.keys() == {"a", "b"}
    assert not smaller.specs  # x was read by `a` alone, and `y` is written in 16 bits
    assert plan.nodes.keys() > smaller.nodes.keys()


def test_a_weight_goes_with_the_nodes_that_read_it() -> None:
    """A product kept for its values may be dropped, and its weight with it; one whose weight overflows may not."""
    why, beyond = Reason(OVERFLOW, "e"), Reason(OVERFLOW, "w")
    plan = Plan({"e": why, "f": why}, weights={"w": why})
    assert groups(branching(), plan) == [["e", "f"]]
    assert not without(branching(), plan, ["e", "f"]).weights
    assert without(branching(), plan, ["f"]).weights == {"w": why}
    fixed = Plan({"e": beyond, "f": why}, weights={"w": beyond})
    assert groups(branching(), fixed) == [["f"]]
    assert without(branching(), fixed, ["f"]).weights == {"w": beyond}


@pytest.mark.parametrize("format", [FP16, BF16])
@pytest.mark.parametrize("kept", [set(), {"b", "e"}, {"a", "y"}, set(NODES)])
def test_rounded_values_are_those_of_the_mix(kept: set[str], format: Format) -> None:
    """A trial computes, number for number, what conversion and emulation make of the same plan."""
    why = Reason(OVERFLOW, "x")
    plan = Plan(dict.fromkeys(kept, why), {"w": why} if "e" in kept else {}, {"z": why, "y": why} if kept else {})
    inputs = {"x": text.numbers(3, 5, seed=2), "z": text.numbers(3, 5, seed=3)}
    mixed, trial = branching(), branching()
    convert_half(mixed, plan, format)
    emulate_half(mixed, format)
    for graph in (mixed, trial):  # numpy has no bfloat16: the mix takes and gives FP32, through casts
        if graph is mixed:
            _fp32_ports(graph)
    round_values(trial, plan, format, {})
    found, expected = text.run(trial, inputs), text.run(mixed, inputs)
    plain = text.run(branching(), inputs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (array != plain[name]).any()


def _fp32_ports(model: ir.Model) -> None:
    """In place: FP32 inputs and outputs, cast to and from what they were."""
    graph = model.graph
    for value in list(graph.inputs):
        if value.dtype not in (None, ir.DataType.FLOAT):
            wanted, uses = value.dtype, list(value.uses())
            value.type = ir.TensorType(ir.DataType.FLOAT)
            node = ir.node("Cast", [value], attributes={"to": int(wanted)})
            node.outputs[0].name, node.outputs[0].type = f"{value.name}.given", ir.TensorType(wanted)
            graph.insert_before(graph[0], node)
            for user, place in uses:
                user.replace_input_with(place, node.outputs[0])
    for place, value in enumerate(tuple(graph.outputs)):
        if value.dtype != ir.DataType.FLOAT:
            node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
            node.outputs[0].name, value.name = value.name, f"{value.name}.made"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def test_headroom_overflows_before_the_limit() -> None:
    """40,000 fits FP16, but not with a margin of two; 30,000 does, and is rounded as it would be without."""
    inputs = {
        "x": np.array([[40000.0, 30001.0, 1.0, -40000.0, 0.0]], np.float32) / 2,
        "z": np.zeros((1, 5), np.float32),
    }
    results = []
    for headroom in ({}, {"a": 2.0}):
        model = branching()
        every = Plan({name: Reason(OVERFLOW, "x") for name in NODES if name != "a"}, {"w": Reason(OVERFLOW, "w")})
        model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Abs").outputs[0])
        model.graph.outputs[-1].type = ir.TensorType(ir.DataType.FLOAT)
        round_values(model, every, FP16, headroom)
        results.append(text.run(model, inputs)["c"])
    rounded = np.float32(np.float16(30001.0))
    np.testing.assert_array_equal(results[0], [[40000.0, rounded, 1.0, 40000.0, 0.0]])
    np.testing.assert_array_equal(results[1], [[np.inf, rounded, 1.0, np.inf, 0.0]])
