"""The table of a plan, and what of it is fused."""

from pathlib import Path

from accel.engine.planning.plan import CHOICE, Row
from tests.engine.one_node import normal
from tests.engine.planning.attention import run
from tests.engine.planning.graphs import planned

WEIGHTS = {
    "layer.0.gate.weight": normal(16, 24),
    "layer.0.up.weight": normal(16, 24),
    "layer.0.down.weight": normal(16, 24),
    "norm": normal(16),
    "b": normal(16),
}


def test_rows(tmp_path: Path) -> None:
    """Each fused operation is a row; nodes that run in torch one after another are one."""
    body = """agraph (float[B,1,16] x) => (float[B,1,16] y) {
    n = SimplifiedLayerNormalization(x, norm) g = MatMul(n, "layer.0.gate.weight") s = Sigmoid(g) a = Mul(g, s)
    u = MatMul(n, "layer.0.up.weight") m = Mul(a, u)
    d = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(m, "layer.0.down.weight") db = Add(d, b) r = Add(db, x)
    c = Cos(r) e = Neg(c) f = Neg(e) t = Sin(f) y = LayerNormalization(t, norm) }"""
    for name in WEIGHTS:
        body = body.replace(f'"{name}"', name.replace(".", "_"))
    weights = {name.replace(".", "_"): weight for name, weight in WEIGHTS.items()}
    result = planned(body, weights, tmp_path)
    gate = "rms norm -> silu(16 x 24 layer_0_gate_weight) * (16 x 24 layer_0_up_weight)"
    assert result.table({"B": 2}) == [
        Row("product", gate, "B x 1 x 24", 2 * 16 * 24 * 4, "fused", 0),
        Row("product", "0.5 * 24 x 16 layer_0_down_weight + b + residual", "B x 1 x 16", 24 * 16 * 4, "fused", 256),
        Row("4 nodes", "2 Neg, Cos, Sin", "B x 1 x 16", 0, "torch", 256),
        Row("normalize", "layer norm", "B x 1 x 16", 0, "fused", None),
        CHOICE,
    ]
    assert result.coverage() == {
        "product_bytes": 3 * 16 * 24 * 4, "fused_share": 1.0, "torch_nodes": 4, "torch_softmaxes": 0,
    }  # fmt: skip


def test_attention_in_words(tmp_path: Path) -> None:
    rows = run(tmp_path).table({"B": 2, "S": 8})
    words = "4 heads of 8 over 2, rotary of 8, 1 bias, new key and value written"
    assert [(row.operation, row.shape, row.description) for row in rows if row.operation == "attention"] == [
        ("attention", "B x 1 x 32", words)
    ]


def test_what_is_left(tmp_path: Path) -> None:
    """A product and an attention in torch count."""
    result = run(tmp_path, ("Softmax<axis = -1>", "Softmax<axis = 1>"))
    assert result.coverage()["torch_softmaxes"] == 1
    body = "agraph (float[B,2,16] x) => (float[B,2,24] y) { y = MatMul(x, w) }"
    result = planned(body, {"w": normal(16, 24)}, tmp_path)
    assert result.table({"B": 2}) == [Row("1 node", "MatMul", "B x 2 x 24", 16 * 24 * 4, "torch", None), CHOICE]
    assert result.coverage()["fused_share"] == 0
