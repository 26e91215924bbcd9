"""Merge strategies two_branch and three_branch: the results of both graphs, and every weight once."""

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from accel.graph.decode.one_token import OneToken
from accel.graph.files import weight_bytes
from accel.graph.merging.merge_branches import fork_if, merge_if
from tests.graph.text import Arrays, flag, numbers, parse, run

FLAG = "enable_cache"

PREFILL = """
prefill (float[batch, new, 4] x, float[batch, source, 4] context)
    => (float[batch, new, 3] logits, float[batch, total, 4] own, float[batch, source, 4] cross)
{
    own = MatMul(x, w_own)
    cross = MatMul(context, w_cross)
    summed = ReduceSum <keepdims: int = 1> (cross, axis)
    mixed = Add(own, summed)
    logits = MatMul(mixed, head)
}"""
DECODE = """
decode (float[batch, new, 4] x, float[batch, past, 4] past_own, float[batch, source, 4] past_cross)
    => (float[batch, new, 3] logits, float[batch, total, 4] own)
{
    key = MatMul(x, weight)
    own = Concat <axis: int = 1> (past_own, key)
    summed = ReduceSum <keepdims: int = 1> (past_cross, axis)
    mixed = Add(key, summed)
    logits = MatMul(mixed, output)
}"""
OWN, CROSS, HEAD, AXIS = numbers(4, 4), numbers(4, 4, seed=1), numbers(4, 3), np.array([1])
INPUTS = {
    "x": numbers(2, 3, 4),
    "context": numbers(2, 5, 4),
    "past_own": numbers(2, 7, 4),
    "past_cross": numbers(2, 6, 4),
}


def prefill() -> ir.Model:
    return parse(PREFILL, {"w_own": OWN, "w_cross": CROSS, "head": HEAD, "axis": AXIS})


STEP_WEIGHTS = {"weight": OWN, "output": HEAD, "axis": AXIS}


def decode() -> ir.Model:
    """Return a decode graph with the same weights as prefill's, under other names."""
    return parse(DECODE, STEP_WEIGHTS)


def assert_branches(when_true: ir.Model, when_false: ir.Model, inputs: Arrays, name: str = FLAG) -> ir.Model:
    """Merge, and compare each branch with its graph run alone. An output that only one graph has must be empty."""
    alone = {True: run(when_true, inputs), False: run(when_false, inputs)}
    merged = merge_if(when_true, when_false, name)
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    for value, expected in alone.items():
        found = run(merged, {**inputs, **flag(value, name)})
        assert list(found) == list(alone[False])
        for output, array in found.items():
            if output in expected:
                np.testing.assert_array_equal(array, expected[output], err_msg=f"{output}, {name}={value}")
            else:
                assert array.size == 0
    return merged


def test_each_branch_gives_its_graphs_numbers() -> None:
    """Outputs are bitwise equal for both values of the flag; one that the decode graph lacks has length 0."""
    merged = assert_branches(decode(), prefill(), INPUTS)
    absent = run(merged, INPUTS | flag(True))["cross"]
    assert absent.shape == (0, 0, 4)
    assert absent.dtype == np.float32


def test_weights_are_stored_once_whatever_their_names() -> None:
    """A weight with two names, in one graph or in both, is stored once; another of its shape is not merged with it."""
    merged = merge_if(decode(), prefill(), FLAG)
    assert weight_bytes(merged) == OWN.nbytes + CROSS.nbytes + HEAD.nbytes + 2 * AXIS.nbytes
    twice = parse(
        "g (float[n, 4] x) => (float[n, 4] y) { a = MatMul(x, first)\n b = MatMul(a, second)\n y = MatMul(b, other) }",
        {"first": OWN, "second": OWN.copy(), "other": CROSS},
    )
    plain = parse("g (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, own) }", {"own": OWN})
    merged = assert_branches(twice, plain, {"x": numbers(2, 4)})
    assert weight_bytes(merged) == OWN.nbytes + CROSS.nbytes
    assert len(merged.graph.initializers) == 2


def test_what_a_provider_wants_on_the_host_stays_in_its_branch() -> None:
    """Axes and lengths stay in their branch: outside, ONNX Runtime would copy them from the device at each run."""
    merged = merge_if(decode(), prefill(), FLAG)
    assert all(value.const_value.size > 8 for value in merged.graph.initializers.values())
    branches = [graph for graph in merged.graphs() if graph is not merged.graph]
    assert [list(branch.initializers) for branch in branches] == [["with_past/axis"], ["without_past/axis"]]
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)


def test_same_name_for_different_weights() -> None:
    """Two different weights of one name are both kept."""
    text = "g (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }"
    merged = assert_branches(parse(text, {"w": OWN}), parse(text, {"w": CROSS}), {"x": numbers(2, 4)})
    assert weight_bytes(merged) == OWN.nbytes + CROSS.nbytes


def test_same_bytes_of_another_type_or_shape_are_not_shared() -> None:
    """Zeros of two shapes, and the same bytes as two types, are different weights."""
    row, column = np.zeros((1, 4), np.float32), np.zeros((4,), np.float32)
    add = "g (float[n, 4] x) => (float[n, 4] y) { y = Add(x, w) }"
    cast = "g (float[n, 4] x) => (float[n, 4] y) { c = Cast <to: int = 1> (w)\n y = Add(x, c) }"
    wide, narrow = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.int32)
    merged = assert_branches(parse(add, {"w": wide}), parse(cast, {"w": narrow}), {"x": numbers(2, 4)})
    assert weight_bytes(merged) == wide.nbytes + narrow.nbytes
    merged = assert_branches(parse(add, {"w": row}), parse(add, {"w": column}), {"x": numbers(2, 4)})
    assert weight_bytes(merged) == row.nbytes + column.nbytes


def test_absent_optional_input() -> None:
    """`Clip(x, , high)`: the omitted input stays omitted, instead of becoming a value named ''."""
    clip = "g (float[n, 4] x, float high) => (float[n, 4] y) { y = Clip(x, , high) }"
    other = "g (float[n, 4] x, float high) => (float[n, 4] y) { y = Min(x, high) }"
    merged = assert_branches(
        parse(clip), parse(other), {"x": 3 * numbers(5, 4), "high": np.array(0.25, dtype=np.float32)}
    )
    clipped = next(node for node in merged.graph.all_nodes() if node.op_type == "Clip")
    assert [None if value is None else value.name for value in clipped.inputs] == ["x", None, "high"]


NESTED = """
g (float[n, 4] x, bool choose, int64 times) => (float[n, 4] y)
{
    hidden = MatMul(x, w)
    picked = If (choose) <
        then_branch = yes () => (float[n, 4] value) { inner = Mul(hidden, x)
 value = Add(inner, bias) },
        else_branch = no () => (float[n, 4] value) { inner = Sub(hidden, x)
 value = MatMul(inner, w) }
    >
    go = Constant <value = bool {1}> ()
    y = Loop (times, go, picked) <
        body = body (int64 i, bool keep, float[n, 4] carried) => (bool again, float[n, 4] result)
        { again = Identity(keep)
 inner = Add(carried, hidden)
 result = Add(inner, bias) }
    >
}"""


@pytest.mark.parametrize("choose", [True, False])
def test_nested_subgraphs_that_capture_outer_values(choose: bool) -> None:
    """An `If` and a `Loop` inside a branch read its values, inputs and weights, under names that occur twice."""

    def weights() -> dict[str, np.ndarray]:
        return {"w": OWN, "bias": numbers(4)}

    inputs = {"x": numbers(3, 4), "choose": np.array(choose), "times": np.array(3)}
    plain = parse("g (float[n, 4] x) => (float[n, 4] y) { hidden = Neg(x)\n y = MatMul(hidden, w) }", {"w": OWN})
    merged = assert_branches(parse(NESTED, weights()), plain, inputs)
    assert weight_bytes(merged) == OWN.nbytes + numbers(4).nbytes
    assert_branches(parse(NESTED, weights()), parse(NESTED.replace("Mul(hidden", "Div(hidden"), weights()), inputs)


def test_two_opset_domains() -> None:
    """With a contrib operator in one branch only, both domains are imported, at their own versions."""
    fused = parse(
        "g (float[n, 4] x) => (float[n, 4] y)"
        "{ y = com.microsoft.FusedMatMul <alpha: float = 0.5, transB: int = 1> (x, w) }",
        {"w": OWN},
    )
    plain = parse(
        "g (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }",
        {"w": OWN},
        '<ir_version: 9, opset_import: ["": 20]>',
    )
    fused.graph.outputs[0].type, fused.graph.outputs[0].shape = (
        plain.graph.outputs[0].type,
        plain.graph.outputs[0].shape,
    )
    alone = run(fused, {"x": numbers(2, 4)})["y"], run(plain, {"x": numbers(2, 4)})["y"]
    merged = merge_if(fused, plain, FLAG)
    assert dict(merged.graph.opset_imports) == {"": 20, "com.microsoft": 1}
    assert merged.ir_version == 10
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    for value, expected in zip((True, False), alone, strict=True):
        np.testing.assert_array_equal(run(merged, {"x": numbers(2, 4)} | flag(value))["y"], expected)


def test_dimensions() -> None:
    """Fixed dimensions and the symbols of inputs stay; `If` outputs get new symbols, as lengths may differ."""
    merged = merge_if(decode(), prefill(), FLAG)
    inputs = {value.name: [str(dim) for dim in value.shape] for value in merged.graph.inputs if value.shape is not None}
    assert inputs == {
        "x": ["batch", "new", "4"],
        "context": ["batch", "source", "4"],
        "past_own": ["batch", "past", "4"],
        "past_cross": ["batch", "source", "4"],
        FLAG: [],
    }
    shapes = {value.name: value.shape for value in merged.graph.outputs}
    assert {name: shape[2] for name, shape in shapes.items()} == {"logits": 3, "own": 4, "cross": 4}
    symbols = [str(dim) for shape in shapes.values() for dim in shape if not isinstance(dim, int)]
    assert len(symbols) == len(set(symbols)) == 6


def test_output_that_is_a_weight() -> None:
    """One branch returns a weight unchanged, the other computes that output."""
    text = "g (float[n, 4] x) => (float[n, 4] y, float[4] kept) { y = Add(x, kept) }"
    weight = parse(text, {"kept": numbers(4)})
    plain = parse(
        "g (float[n, 4] x) => (float[n, 4] y, float[4] kept) { y = Neg(x)\n kept = Neg(w) }", {"w": numbers(4)}
    )
    assert_branches(weight, plain, {"x": numbers(2, 4)})
    assert_branches(plain_outputs(), parse(text, {"kept": numbers(4)}), {"x": numbers(2, 4)})


def plain_outputs() -> ir.Model:
    """Return a graph with the outputs `y` and `kept`, both computed."""
    return parse(
        "g (float[n, 4] x) => (float[n, 4] y, float[4] kept) { y = Abs(x)\n kept = Abs(w) }", {"w": numbers(4)}
    )


def test_output_that_is_an_input() -> None:
    """Such an output has the name of its input, which the output of the `If` can't have, too."""
    text = "g (float[n, 4] x) => (float[n, 4] y, float[n, 4] x) { y = Neg(x) }"
    with pytest.raises(ValueError, match="'x'"):
        merge_if(parse(text), parse(text.replace("Neg", "Abs")), FLAG)


def test_missing_output_needs_a_dynamic_axis() -> None:
    """An output of fixed dimensions can't have length 0, so no branch may lack it."""
    both = parse("g (float[n, 4] x) => (float[n, 4] y, float[4] z) { y = Neg(x)\n z = Neg(w) }", {"w": numbers(4)})
    one = parse("g (float[n, 4] x) => (float[n, 4] y) { y = Abs(x) }")
    with pytest.raises(ValueError, match=r"'z'.*no dynamic axis"):
        merge_if(one, both, FLAG)


def simple(inputs: str = "float[n, 4] x", output: str = "y", opset: int = 20) -> ir.Model:
    """Return a graph of one node."""
    return parse(
        f"g ({inputs}) => (float[n, 4] {output}) {{ {output} = Neg(x) }}",
        header=f'<ir_version: 10, opset_import: ["" : {opset}]>',
    )


@pytest.mark.parametrize(
    ("when_true", "when_false", "named"),
    [
        (simple(opset=20), simple(opset=18), ("ai.onnx", "20", "18")),
        (simple("float[n, 4] x, float[n, 4] z"), simple("float[n, 4] x, int64[n, 4] z"), ("'z'", "INT64", "FLOAT")),
        (simple("float[n, 4] x, float[n, 4] z"), simple("float[n, 4] x, float[n, 5] z"), ("'z'", "5", "4")),
        (simple(output="other"), simple(), ("'other'",)),
        (simple(f"float[n, 4] x, bool {FLAG}"), simple(), (FLAG, "x")),
    ],
    ids=["opset", "input type", "input shape", "output", "flag"],
)
def test_contradictions_are_named(when_true: ir.Model, when_false: ir.Model, named: tuple[str, ...]) -> None:
    """The error for graphs that can't be merged names the contradiction and both of its values."""
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named))):
        merge_if(when_true, when_false, FLAG)


def test_flag_is_a_name_of_your_choice() -> None:
    """Optimum and Transformers.js call the flag `use_cache_branch`."""
    merged = assert_branches(decode(), prefill(), INPUTS, "use_cache_branch")
    assert merged.graph.inputs[-1].name == "use_cache_branch"
    assert merged.graph.inputs[-1].dtype == ir.DataType.BOOL


def test_names_do_not_clash() -> None:
    """All nodes and values of the merged graph have distinct names, subgraphs included."""
    merged = merge_if(decode(), prefill(), FLAG)
    nodes = [node.name for node in merged.graph.all_nodes()]
    values = [value.name for node in merged.graph.all_nodes() for value in node.outputs if value.name]
    assert len(nodes) == len(set(nodes))
    assert len(values) == len(set(values))


def forked() -> ir.Model:
    """Return the decode graph with a branch for one token that computes something else, to show which one ran."""
    single = parse(DECODE.replace("mixed = Add(key, summed)", "mixed = Sub(key, summed)"), STEP_WEIGHTS)
    OneToken("new")(single)
    return fork_if(single, decode(), "new")


def one(inputs: Arrays) -> Arrays:
    return {**inputs, "x": inputs["x"][:, :1]}


def test_one_token_has_a_branch_of_its_own() -> None:
    """The number of new tokens selects the branch, inside the other `If` as well; weights are stored once."""
    single = run(
        parse(DECODE.replace("mixed = Add(key, summed)", "mixed = Sub(key, summed)"), STEP_WEIGHTS), one(INPUTS)
    )
    alone = {1: single, 3: run(decode(), INPUTS)}
    merged = merge_if(forked(), prefill(), FLAG)
    for model, given in ((forked(), {}), (merged, flag(True))):
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for inputs, new in ((one(INPUTS), 1), (INPUTS, 3)):
            found = run(model, {**inputs, **given})
            for name, array in alone[new].items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{name}, {new} new")
    assert run(merged, INPUTS | flag(False))["cross"].shape == (2, 5, 4)
    assert weight_bytes(merged) == OWN.nbytes + CROSS.nbytes + HEAD.nbytes + 3 * AXIS.nbytes
    nodes = [node.name for node in merged.graph.all_nodes()]
    assert len(nodes) == len(set(nodes))


def test_an_axis_that_no_input_has() -> None:
    with pytest.raises(ValueError, match="'fresh'"):
        fork_if(decode(), decode(), "fresh")
