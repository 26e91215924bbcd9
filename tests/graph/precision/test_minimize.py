"""Reduction of precision plans, on graphs small enough to try every choice."""

from itertools import combinations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.emulate import emulate_half, round_values
from accel.graph.precision.formats import BF16, FP16, Format
from accel.graph.precision.minimize import drop_nodes, droppable_groups, find_droppable, minimize_casts
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
    """Return the number of casts with the nodes `kept` in FP32, and the weight as well if its reader is among them."""
    model = branching()
    why = Reason(OVERFLOW, "x")
    convert_half(model, Plan(dict.fromkeys(kept, why), {"w": why} if "e" in kept else {}))
    return half_share(model)["casts"]


@pytest.mark.parametrize(
    "kept", [{"a", "c"}, {"b"}, {"c", "f"}, {"a", "y"}, {"f", "y"}, {"e", "side"}, {"b", "d", "h"}]
)
def test_no_other_choice_costs_fewer_casts(kept: set[str]) -> None:
    """Compare with every set of nodes that includes `kept` and doesn't change the type of the product's weight."""
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
    assert len(kept | added.keys()) == smallest  # no more nodes in FP32 than that takes


def test_a_node_between_two_islands_joins_them() -> None:
    """A node in 16 bits between two in FP32 costs two casts; the sum of two FP32 results costs one less in FP32."""
    assert minimize_casts(branching(), Plan(dict.fromkeys(("a", "c"), Reason(OVERFLOW, "x")))).keys() == {"b", "d"}
    assert minimize_casts(branching(), Plan()) == {}


@pytest.mark.parametrize("needed", [set(), {"3"}, {"0", "7"}, {"2", "3"}, set("01234567")])
def test_what_is_not_needed_is_dropped(needed: set[str]) -> None:
    """Of eight groups, all that are not needed are dropped, and exactly that combination was tried."""
    tried: list[set[str]] = []

    def passes(names: list[str]) -> bool:
        tried.append(set(names))
        return not needed & set(names)

    found = find_droppable([[str(number)] for number in range(8)], passes, trials=100)
    assert set(found) == set("01234567") - needed
    assert not found or set(found) in tried
    assert len(tried) <= 15


def test_trials_are_counted() -> None:
    """With too few trials to find the group that is needed, only what a trial confirmed is dropped."""
    calls: list[list[str]] = []

    def passes(names: list[str]) -> bool:
        calls.append(names)
        return "5" not in names

    found = find_droppable([[str(number)] for number in range(8)], passes, trials=3)
    assert len(calls) == 3
    assert found == ["0", "1", "2", "3"] == calls[1]


def test_nodes_are_dropped_by_what_keeps_them() -> None:
    """Nodes kept for one value form a group, underflow first; rules that hold for any numbers are not tried."""
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
    assert droppable_groups(branching(), plan) == [["d"], ["a", "b"], ["h"]]
    smaller = drop_nodes(branching(), plan, ["a", "b"])
    assert smaller.nodes.keys() == {"c", "d", "e", "h"}
    assert smaller.dropped.keys() == {"a", "b"}
    assert not smaller.specs  # only `a` read x, and `y` is written in 16 bits
    assert plan.nodes.keys() > smaller.nodes.keys()


def test_a_weight_goes_with_the_nodes_that_read_it() -> None:
    """A product kept for its result may be dropped together with its weight; one whose weight overflows may not."""
    why, beyond = Reason(OVERFLOW, "e"), Reason(OVERFLOW, "w")
    plan = Plan({"e": why, "f": why}, weights={"w": why})
    assert droppable_groups(branching(), plan) == [["e", "f"]]
    assert not drop_nodes(branching(), plan, ["e", "f"]).weights
    assert drop_nodes(branching(), plan, ["f"]).weights == {"w": why}
    fixed = Plan({"e": beyond, "f": why}, weights={"w": beyond})
    assert droppable_groups(branching(), fixed) == [["f"]]
    assert drop_nodes(branching(), fixed, ["f"]).weights == {"w": beyond}


@pytest.mark.parametrize("format", [FP16, BF16])
@pytest.mark.parametrize("kept", [set(), {"b", "e"}, {"a", "y"}, set(NODES)])
def test_rounded_values_are_those_of_the_mix(kept: set[str], format: Format) -> None:
    """A trial computes exactly what conversion and emulation with the same plan compute."""
    why = Reason(OVERFLOW, "x")
    plan = Plan(dict.fromkeys(kept, why), {"w": why} if "e" in kept else {}, {"z": why, "y": why} if kept else {})
    inputs = {"x": text.numbers(3, 5, seed=2), "z": text.numbers(3, 5, seed=3)}
    mixed, trial = branching(), branching()
    convert_half(mixed, plan, format)
    emulate_half(mixed, format)
    for graph in (mixed, trial):  # numpy has no bfloat16: inputs and outputs of the converted graph are cast
        if graph is mixed:
            _fp32_specs(graph)
    round_values(trial, plan, format, {})
    found, expected = text.run(trial, inputs), text.run(mixed, inputs)
    plain = text.run(branching(), inputs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (array != plain[name]).any()


def _fp32_specs(model: ir.Model) -> None:
    """Make inputs and outputs FP32, in place, with casts to and from their former types."""
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
    """40,000 fits FP16, but not with a margin of 2; 30,000 does, and is rounded as without a margin."""
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
