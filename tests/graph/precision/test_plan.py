"""Precision plans, conversion and emulation, on graphs small enough to check by hand."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.emulate import emulate_half
from accel.graph.precision.formats import FLOAT, FP16
from accel.graph.precision.observer import OUTPUTS, ValueStatistics, infer_types, insert_observers, read_observers
from accel.graph.precision.plan import Plan, clamp_masks, make_plan, unite
from tests.graph import text

NORM = """
<ir_version: 10, opset_import: ["" : 20]>
norm (float[batch, 4] x, float[4, 4] w) => (float[batch, 4] y)
<float two = {2.0}, int64[1] last = {-1}, float eps = {1e-6}> {
    square = Pow (x, two)
    mean = ReduceMean (square, last)
    variance = Add (mean, eps)
    root = Sqrt (variance)
    scale = Reciprocal (root)
    normed = Mul (x, scale)
    y = MatMul (normed, w)
}
"""
CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
chain (float[n] x) => (float[n] y) <float big = {2000.0}> {
    up = Mul (x, big)
    more = Mul (up, big)
    down = Div (more, big)
    y = Div (down, big)
}
"""


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    """Run a graph on ONNX Runtime's CPU provider and return its outputs in order."""
    return list(text.run(model, inputs).values())


def held(model: ir.Model, **inputs: np.ndarray) -> dict[str, ValueStatistics]:
    """Return statistics of all float values of `model`, computed by making each of them a graph output."""
    values = [output for node in model.graph for output in node.outputs if output.dtype in (FLOAT, None)]
    probe = model.clone()
    names = [value.name for value in values]
    produced = {output.name: output for node in probe.graph for output in node.outputs}
    probe.graph.outputs.clear()
    for name in names:
        produced[name].type = ir.TensorType(FLOAT)
        probe.graph.outputs.append(produced[name])
    found = dict(zip(names, run(probe, **inputs), strict=True)) | inputs
    return {
        name: ValueStatistics(
            float(np.abs(v).max()), float(np.abs(v[v != 0]).min(initial=np.inf)), int((~np.isfinite(v)).sum())
        )
        for name, v in found.items()
        if v.dtype == np.float32
    }


def typed(body: str) -> ir.Model:
    model = ir.from_onnx_text(body)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def test_overflow_keeps_every_node_that_touches_the_value() -> None:
    """Squares of x, around 1000, are outside FP16's range: the nodes that write and read them stay in FP32."""
    model = typed(NORM)
    x = np.array([[1000, -2000, 500, 3000]], np.float32)
    plan = make_plan(model, held(model, x=x, w=np.eye(4, dtype=np.float32)), overflow_margin=2.0)
    assert {"square", "mean"} <= plan.nodes.keys()
    assert "y" not in plan.nodes
    assert plan.nodes["square"].rule == "overflow"
    assert plan.nodes["square"].largest == pytest.approx(9e6)


def test_underflow_counts_only_where_zero_changes_the_result() -> None:
    """Squares of 1e-4 are zero in FP16, and the norm would divide by zero. A tiny input may become zero."""
    model = typed(NORM)
    x = np.array([[1e-4, -1e-4, 2e-4, 1e-4]], np.float32)
    plan = make_plan(model, held(model, x=x, w=np.eye(4, dtype=np.float32)), overflow_margin=2.0)
    assert {"square", "mean", "variance", "root"} <= plan.nodes.keys()
    assert plan.nodes["root"].rule == "underflow"
    assert "y" not in plan.nodes
    tiny_but_harmless = np.array([[1e-9, 1, 2, 3]], np.float32)
    assert not make_plan(
        model, held(model, x=tiny_but_harmless, w=np.eye(4, dtype=np.float32)), overflow_margin=2.0
    ).nodes


@pytest.mark.parametrize("size", [1e-4, 1.0, 1000.0])
def test_the_planned_mix_is_right_where_blind_fp16_is_not(size: float) -> None:
    """At three sizes of input, the norm converted by a plan agrees with FP32; without a plan, only at size 1."""
    x = (size * np.array([[1, -2, 0.5, 3], [2, 1, -1, -3]])).astype(np.float32)
    w = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
    right = run(typed(NORM), x=x, w=w)[0]
    inputs = {"x": x.astype(np.float16), "w": w.astype(np.float16)}

    def error(plan: Plan) -> float:
        model = typed(NORM)
        convert_half(model, plan)
        emulate_half(model)
        return float(np.abs(run(model, **inputs)[0].astype(np.float32) - right).max() / np.abs(right).max())

    audited = make_plan(typed(NORM), held(typed(NORM), x=x, w=w), overflow_margin=2.0)
    assert error(audited) < 0.004
    assert (error(Plan()) < 0.004) == (size == 1.0)


def test_emulation_shows_overflow_that_the_cpu_provider_hides() -> None:
    """The CPU provider computes the FP16 graph in FP32, with a finite result; FP16 arithmetic overflows."""
    model = typed(CHAIN)
    convert_half(model, Plan())
    x = np.array([1.0], np.float16)
    assert np.isfinite(run(model, x=x)[0]).all()
    emulate_half(model)
    assert not np.isfinite(run(model, x=x)[0]).any()
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == FP16.dtype


def test_casts_stand_only_at_borders() -> None:
    """Two adjacent nodes in FP32 need one cast before and one after them, and constants none."""
    model = typed(CHAIN)
    reason = make_plan(model, {"more": ValueStatistics(4e6, 4e6)}, overflow_margin=1.0)
    assert reason.nodes.keys() == {"more", "down"}
    convert_half(model, reason)
    assert [node.op_type for node in model.graph] == ["Mul", "Cast", "Mul", "Div", "Cast", "Div"]
    assert half_share(model)["casts"] == 2
    emulate_half(model)
    assert run(model, x=np.array([3.0], np.float16))[0] == 3.0


def test_masks_are_clamped_and_other_large_constants_are_not() -> None:
    """finfo.min is replaced by a number to which FP16 can add a score; a large weight stays in FP32 instead."""
    model = typed("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (bool[n] mask, float[n] score) => (float[n] y)
    <float lowest = {-3.4028234663852886e+38}, float zero = {0.0}, float[2] weight = {-100000.0, 1.0}> {
        where = Where (mask, zero, lowest)
        y = Add (where, score)
    }""")
    clamp_masks(model)
    assert float(model.graph.initializers["lowest"].const_value.numpy()) == FP16.mask_value
    assert model.graph.initializers["weight"].const_value.numpy().min() == -100000
    assert make_plan(model, {}, overflow_margin=2.0).weights.keys() == {"weight"}


def test_arithmetic_on_positions_stays() -> None:
    """The logarithm of a distance becomes an index: rounded to FP16, it would select another element."""
    model = typed("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (int64[n] distance, float[32] table) => (float[n] y) <float eight = {8.0}> {
        real = Cast <to: int = 1> (distance)
        log = Log (real)
        scaled = Mul (log, eight)
        index = Cast <to: int = 7> (scaled)
        y = Gather (table, index)
    }""")
    plan = make_plan(model, {}, overflow_margin=2.0)
    assert plan.nodes.keys() == {"real", "log", "scaled"}
    assert {reason.rule for reason in plan.nodes.values()} == {"rounding that would change an integer"}
    convert_half(model, plan)
    distance = np.arange(1, 33)
    table = np.arange(32, dtype=np.float16)
    found = run(model, distance=distance, table=table)[0]
    np.testing.assert_array_equal(found, (np.log(distance.astype(np.float32)) * 8).astype(np.int64))


@pytest.mark.parametrize("function", ["Cos", "Sin"])
def test_angles_stay(function: str) -> None:
    """A rotary embedding's angles at position 2,000: in FP16 they would be off by up to half a radian."""
    model = typed(f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g (int64[n, 1] position, float[n, 4] x) => (float[n, 4] y) <float[1, 4] frequencies = {{0.93, 0.61, 0.1, 0.01}}> {{
        real = Cast <to: int = 1> (position)
        angle = Mul (real, frequencies)
        turn = {function} (angle)
        y = Mul (x, turn)
    }}""")
    plan = make_plan(model, {}, overflow_margin=2.0)
    assert plan.nodes.keys() == {"real", "angle", "turn"}
    assert {reason.rule for reason in plan.nodes.values()} == {"rounding that would turn an angle"}
    position, x = np.array([[3], [517], [2003]]), np.ones((3, 4), np.float32)
    expected = run(model, position=position, x=x)[0]
    errors = []
    for kept in (plan, Plan()):
        half = model.clone()
        convert_half(half, kept)
        emulate_half(half)
        given = x if half.graph.inputs[1].dtype == FLOAT else x.astype(np.float16)
        errors.append(np.abs(run(half, position=position, x=given)[0] - expected).max())
    assert errors[0] < 1e-3 < 0.1 < errors[1]


def test_a_weight_kept_in_one_graph_is_kept_in_both() -> None:
    """Otherwise the same matrix would be stored twice, in FP32 and in FP16."""
    body = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 5] x, float[n, 5] past) => (float[n, 5] y) {
        made = Add (x, past)
        y = MatMul (made, w)
    }"""
    models = {}
    for name in ("prefill", "decode"):
        model = ir.from_onnx_text(body, initializers=[ir.tensor(np.eye(5, dtype=np.float32), name="w")])
        ir.passes.common.ShapeInferencePass()(model)
        models[name] = model
    plans = {"prefill": make_plan(models["prefill"], {"y": ValueStatistics(1e6, 1.0)}, 2.0), "decode": Plan()}
    unite(plans, models, {"past": "y"})
    assert plans["decode"].nodes.keys() == {"y"}
    assert plans["decode"].weights.keys() == plans["prefill"].weights.keys() == {"w"}
    assert plans["decode"].specs.keys() == plans["prefill"].specs.keys() == {"past", "y"}


def test_what_a_subgraph_reads_stays() -> None:
    """Nodes inside an `If` are not converted, so the outer value that they read must keep its type."""
    model = typed("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (bool flag, float[n] x) => (float[n] y) <float two = {2.0}> {
        doubled = Mul (x, two)
        chosen = If (flag) <
            then_branch = a () => (float[n] t) { t = Neg (doubled) },
            else_branch = b () => (float[n] e) { e = Abs (doubled) }
        >
        y = Mul (chosen, two)
    }""")
    plan = make_plan(model, {}, overflow_margin=2.0)
    assert {"doubled", "chosen"} <= plan.nodes.keys()
    convert_half(model, plan)
    for flag, right in ((True, -12.0), (False, 12.0)):
        assert run(model, flag=np.array(flag), x=np.array([3.0], np.float16))[0] == right


FUSED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
fused (float[b, t, 4] x, float[b, t, 4] h, float[4, 4] m) => (float[b, t, 4] y, float[b, t, 4] sum)
<float[b, t, 4] first, float[b, t, 4] second> {
    first = SimplifiedLayerNormalization <axis: int = -1, epsilon: float = 1e-6, stash_type: int = 1> (x, w)
    second, , , sum = com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = 1e-6> (first, h, w)
    y = MatMul (second, m)
}
"""


def fused() -> ir.Model:
    return text.parse(FUSED.split(">", 1)[1], {"w": np.linspace(0.5, 1.5, 4, dtype=np.float32)})


INPUTS = {"x": text.numbers(2, 3, 4) * 1e-4, "h": text.numbers(2, 3, 4, seed=1), "m": text.numbers(4, 4)}


def test_fused_norms_need_no_care_inside() -> None:
    """Squares of inputs around 1e-4 underflow in FP16, but the fused norm computes them in FP32 internally."""
    model = fused()
    infer_types(model)
    absent = [value for node in model.graph for value in node.outputs if not value.name]
    assert len(absent) == 2
    statistics = {name: ValueStatistics(4.0, 1e-7) for name in ("x", "h", "first", "second", "sum", "y")}
    plan = make_plan(model, statistics, overflow_margin=2.0)
    assert not plan.nodes
    right = text.run(fused(), INPUTS)
    half = fused()
    convert_half(half, plan)
    assert half_share(half) == {"nodes": 1.0, "weight_bytes": 1.0, "fp32_nodes": 0, "fp32_bytes": 0, "casts": 0}
    emulate_half(half)
    found = text.run(half, {name: array.astype(np.float16) for name, array in INPUTS.items()})
    for name, array in right.items():
        assert np.abs(found[name] - array).max() < 0.01 * np.abs(array).max(), name


def test_a_sum_that_overflows_keeps_its_node_whole() -> None:
    """Norm and sum are one node: if the sum overflows FP16, the node and the graph output of the sum stay FP32."""
    model = fused()
    infer_types(model)
    plan = make_plan(model, {"sum": ValueStatistics(1e5, 1.0)}, overflow_margin=2.0)
    assert plan.nodes.keys() == {"second"}
    assert plan.specs.keys() == {"sum"}
    large = INPUTS | {"h": (INPUTS["h"] * 1e4).astype(np.float16)}
    half = fused()
    convert_half(half, plan)
    node = next(node for node in half.graph if node.op_type == "SkipSimplifiedLayerNormalization")
    assert {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.name} == {FLOAT}
    emulate_half(half)
    found = text.run(half, {name: array.astype(np.float16) for name, array in large.items()})
    right = text.run(fused(), {name: array.astype(np.float32) for name, array in large.items()})
    for name, array in right.items():
        assert np.abs(found[name] - array).max() < 0.01 * np.abs(array).max(), name


def test_observers_measure_fused_nodes() -> None:
    """All outputs of a node are observed, except optional ones that it omits."""
    model = fused()
    names = insert_observers(model)
    assert names == ["x", "h", "m", "first", "second", "sum", "y"]
    found = text.run(model, INPUTS)
    statistics = read_observers(names, [found[name] for name in OUTPUTS])
    assert statistics["sum"].largest == pytest.approx(np.abs(found["sum"]).max())
    assert statistics["y"].largest == pytest.approx(np.abs(found["y"]).max())
