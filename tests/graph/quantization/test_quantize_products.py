"""Which products read quantized weights, and that nothing else changes."""

import numpy as np
import pytest

from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.channels import ChannelFormat
from accel.graph.quantization.products import find_weights
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts, low_bit_share
from tests.graph.text import numbers, parse, run

INT8 = BlockFormat(8, 32)
X = numbers(3, 40, seed=2)
PRODUCTS = {
    "MatMul": "y = MatMul(x, w)",
    "of a transpose": "t = Transpose <perm: ints = [1, 0]> (v)\n y = MatMul(x, t)",
    "Gemm": "y = Gemm(x, w, b)",
    "Gemm, [out, in]": "y = Gemm <transB: int = 1> (x, v, b)",
    "Gemm without bias": "y = Gemm(x, w)",
    "FusedMatMul": "y = com.microsoft.FusedMatMul <transB: int = 1> (x, v)",
}
WEIGHTS = {"w": numbers(40, 24), "v": np.ascontiguousarray(numbers(40, 24).T), "b": numbers(24, seed=3)}


@pytest.mark.parametrize("format", [INT8, BlockFormat(8, 64, symmetric=False), ChannelFormat()], ids=lambda f: f.name)
@pytest.mark.parametrize("text", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_every_spelling_of_a_product(text: str, format: BlockFormat | ChannelFormat) -> None:
    """All give what the same integers give: a weight stored as [out, in] is the same weight."""
    used = {
        name: array
        for name, array in WEIGHTS.items()
        if f" {name})" in text or f", {name}" in text or f"({name})" in text
    }
    model = parse(f"g (float[n, 40] x) => (float[n, 24] y) {{ {text} }}", used)
    before = run(model, {"x": X})["y"]
    chosen = dict.fromkeys(("w", "v"), format)
    assert QuantizeProducts(chosen, QuantizedWeights())(model).modified
    bias = WEIGHTS["b"] if "b" in used else 0
    restored = format.dequantize(format.quantize(WEIGHTS["w"]), 40)  # type: ignore[arg-type]
    found = run(model, {"x": X})["y"]
    np.testing.assert_allclose(found, format.round_activations(X) @ restored + bias, atol=0.02)
    np.testing.assert_allclose(found, before, atol=0.03 * np.abs(before).max())
    assert not {"w", "v"} & set(model.graph.initializers)
    assert low_bit_share(model)["weight_bytes"] == 1


TIED = """g (float[n, m, 40] x, int64[n, k] ids) => (float[n, m, 24] y, float[n, k, 40] e)
{ e = Gather(v, ids)
 t = Transpose <perm: ints = [1, 0]> (v)
 y = MatMul(x, t) }"""


@pytest.mark.parametrize("format", [INT8, BlockFormat(8, 16, symmetric=False), BlockFormat(4, 32),
                                    BlockFormat(4, 16, symmetric=False)], ids=lambda f: f.name)  # fmt: skip
def test_a_tied_embedding_is_stored_once(format: BlockFormat) -> None:
    """Looked up where the product reads it; 40 features are no whole number of blocks."""
    model = parse(TIED, {"v": WEIGHTS["v"]})
    QuantizeProducts({"v": format}, QuantizedWeights())(model)
    ids = np.array([[3, 0, 23], [5, 5, 1]])
    found = run(model, {"x": X[None], "ids": ids})
    restored = format.dequantize(format.quantize(WEIGHTS["w"]), 40)
    np.testing.assert_allclose(found["e"], restored.T[ids], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["y"][0], format.round_activations(X) @ restored, atol=0.02)
    integers = [value for value in model.graph.initializers.values() if value.const_value.dtype.name == "UINT8"]
    assert sum(value.const_value.nbytes >= 24 * 40 * format.bits // 8 for value in integers) == 1


def test_a_graph_that_only_looks_a_table_up() -> None:
    """An encoder's, where the decoder multiplies with it."""
    model = parse("g (int64[n, k] ids) => (float[n, k, 40] e) { e = Gather(v, ids) }", {"v": WEIGHTS["v"]})
    QuantizeProducts({"v": INT8}, QuantizedWeights())(model)
    ids = np.array([[3, 0, 23]])
    restored = INT8.dequantize(INT8.quantize(WEIGHTS["w"]), 40)
    np.testing.assert_allclose(run(model, {"ids": ids})["e"], restored.T[ids], rtol=1e-6, atol=1e-7)


OBSTACLES = {
    "the first factor": ("g (float[40, 24] x) => (float[24, 24] y) { t = Transpose (w)\n y = MatMul(t, x) }", None),
    "also added": ("g (float[40, 24] x, float[n, 40] z) => (float[n, 24] y, float[40, 24] s) "
                   "{ y = MatMul(z, w)\n s = Add(x, w) }", "Add reads it"),
    "both axes": ("g (float[n, 40] z, float[n, 24] u) => (float[n, 24] y, float[n, 40] s) "
                  "{ y = MatMul(z, w)\n t = Transpose(w)\n s = MatMul(u, t) }", "both axes"),
    "columns looked up": ("g (float[n, 40] z, int64[k] ids) => (float[n, 24] y, float[k, 24] s) "
                          "{ y = MatMul(z, w)\n s = Gather(w, ids) }", "both axes"),
    "a branch": ("g (float[n, 40] z, bool c) => (float[n, 24] y, float[n, 24] s) { y = MatMul(z, w)\n s = If (c) <"
                 "then_branch = t () => (float[n, 24] a) { a = MatMul(z, w) }, "
                 "else_branch = f () => (float[n, 24] d) { d = Neg(y) }> }", "a subgraph reads it"),
    "scaled": ("g (float[n, 40] z) => (float[n, 24] y) { y = Gemm <alpha: float = 0.5> (z, w) }", None),
}  # fmt: skip


@pytest.mark.parametrize(("text", "obstacle"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_is_read_otherwise_stays(text: str, obstacle: str | None) -> None:
    """The graph doesn't change, and the reason is known."""
    model = parse(text, {"w": WEIGHTS["w"]})
    found = find_weights(model).get("w")
    assert (found is None) if obstacle is None else (found is not None and obstacle in found.obstacle)
    assert not QuantizeProducts({"w": INT8}, QuantizedWeights())(model).modified
    assert "w" in model.graph.initializers


def test_a_weight_of_two_graphs_is_quantized_once() -> None:
    """Under names that are the same in both, so that the merged file stores it once."""
    weights = QuantizedWeights()
    names = []
    for _ in range(2):
        model = parse("g (float[n, 40] x) => (float[n, 24] y) { y = MatMul(x, w) }", {"w": WEIGHTS["w"]})
        QuantizeProducts({"w": INT8}, weights)(model)
        names.append(sorted(model.graph.initializers))
    assert names[0] == names[1] == ["w.int8.data", "w.int8.scales"]
    assert len(weights) == 1
