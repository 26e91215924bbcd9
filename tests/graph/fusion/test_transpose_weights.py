"""The weights of products are stored [out, in] where every graph only multiplies with them."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.fuse_transposed_matmul import FuseTransposedMatmul
from accel.graph.fusion.transpose_weights import TransposeWeights
from accel.graph.merging.merge_branches import merge_if
from accel.graph.weights import initializers, shared_bytes
from tests.graph.text import Arrays, flag, numbers, parse, rewritten, run, weight

WEIGHT = numbers(8, 4)  # [in, out]
INPUTS = {"x": numbers(2, 3, 8), "ids": np.array([[0, 3, 1]])}

LINEAR = "g (float[n, m, 8] x) => (float[n, m, 4] y) { y = MatMul(x, w) }"
TWO = """g (float[n, m, 8] x) => (float[n, m, 4] y)
{ s = Neg(x) a = MatMul(x, w) b = MatMul(s, w) c = Abs(a) y = Add(b, c) }"""
LOOKED_UP = """g (float[n, m, 8] x, int64[n, k] ids) => (float[n, m, 4] y, float[n, k, 4] e)
{ e = Gather(w, ids) y = MatMul(x, w) }"""
BOTH_WAYS = "g (float[n, m, 8] x) => (float[n, m, 8] z) { y = MatMul(x, w) t = Transpose(w) z = MatMul(y, t) }"
CAST = """g (float[n, m, 8] x) => (float[n, m, 4] y)
{ h = Cast<to = 10>(x) v = Cast<to = 10>(w) p = MatMul(h, v) a = Cast<to = 1>(p) b = MatMul(x, w) y = Add(a, b) }"""
BRANCHES = """g (float[n, m, 8] x, bool c) => (float[n, m, 4] y)
{ y = If (c) <then_branch = t () => (float[n, m, 4] z) { z = MatMul(x, w) },
             else_branch = e () => (float[n, m, 4] u) { p = MatMul(x, w) u = Neg(p) }> }"""
GEMM = "g (float[n, 8] x) => (float[n, 4] y) { y = Gemm<alpha = 0.5, beta = 2.0>(x, w, bias) }"


def transposed(*texts: str, content: np.ndarray = WEIGHT) -> tuple[list[ir.Model], list[list[str]]]:
    """The graphs after the pass, their numbers checked against those before, and their operators."""
    models = [parse(text, {"w": content, "bias": numbers(4)}) for text in texts]
    inputs: list[Arrays] = [INPUTS | {"c": np.array(value)} for value in (True, False)]
    if "float[n, 8]" in texts[0]:
        inputs = [{"x": INPUTS["x"][0]}]
    rtol = 1e-3 if CAST in texts else 1e-5  # ONNX Runtime computes half products on the CPU by other kernels
    return models, rewritten(TransposeWeights(), models, inputs, rtol)


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        (LINEAR, ["FusedMatMul"]),
        (TWO, ["Neg", "FusedMatMul", "FusedMatMul", "Abs", "Add"]),
        (CAST, ["Cast", "Cast", "FusedMatMul", "Cast", "FusedMatMul", "Add"]),
        (GEMM, ["Gemm"]),
    ],
    ids=["one product", "two", "through a cast", "with a bias"],
)
def test_weight_is_stored_as_rows(text: str, operators: list[str]) -> None:
    """The content is transposed, under the same name; node names stay, because an audit's plan refers to them."""
    names = [node.name for node in parse(text).graph]
    (model,), (found,) = transposed(text)
    np.testing.assert_array_equal(weight(model, "w"), WEIGHT.T)
    assert list(model.graph.initializers["w"].shape) == [4, 8]
    assert found == operators
    assert [node.name for node in model.graph] == names
    assert {node.attributes.get_int("transB", 0) for node in model.graph if "M" in node.op_type[1:]} <= {1}


def test_weight_that_two_graphs_multiply_with_is_stored_once() -> None:
    """Such as encoder and decoder, or prefill and decode."""
    (first, second), _ = transposed(LINEAR, TWO)
    assert shared_bytes(initializers(first), initializers(second)) == WEIGHT.nbytes + numbers(4).nbytes
    np.testing.assert_array_equal(weight(second, "w"), WEIGHT.T)


def test_products_in_branches() -> None:
    (model,), _ = transposed(BRANCHES)
    found = Counter(node.op_type for node in model.graph.all_nodes())
    assert (found["MatMul"], found["FusedMatMul"]) == (0, 2)
    np.testing.assert_array_equal(weight(model, "w"), WEIGHT.T)


@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (8, 13)])
def test_odd_widths(shape: tuple[int, int]) -> None:
    """Nothing is padded."""
    content = numbers(*shape)
    (model,), _ = transposed(LINEAR.replace("m, 4", f"m, {shape[1]}"), content=content)
    np.testing.assert_array_equal(weight(model, "w"), content.T)


@pytest.mark.parametrize("text", [LOOKED_UP, BOTH_WAYS], ids=["looked up", "both ways"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_weight_that_a_graph_reads_otherwise_stays_in_all(text: str, order: tuple[int, int]) -> None:
    """So that the graphs keep holding equal bytes, whichever comes first."""
    texts = (LINEAR, text)
    models, operators = transposed(*(texts[index] for index in order))
    for model in models:
        np.testing.assert_array_equal(weight(model, "w"), WEIGHT)
    assert "FusedMatMul" not in operators[0] + operators[1]


OTHER = {
    "the first factor": ("g (float[4, 3] x) => (float[8, 3] y) { y = MatMul(w, x) }", WEIGHT),
    "both factors": ("g () => (float[8, 8] y) { y = MatMul(w, w) }", numbers(8, 8)),
    "stacked": ("g (float[2, 3, 8] x) => (float[2, 3, 4] y) { y = MatMul(x, w) }", numbers(2, 8, 4)),
    "a vector": ("g (float[2, 3, 8] x) => (float[2, 3] y) { y = MatMul(x, w) }", numbers(8)),
    "returned": ("g (float[2, 3, 8] x) => (float[2, 3, 4] y, float[8, 4] w) { y = MatMul(x, w) }", WEIGHT),
    "stored as rows": ("g (float[3, 8] x) => (float[3, 4] y) { y = Gemm<transB = 1>(x, w) }", numbers(4, 8)),
    "a bias": ("g (float[8, 8] x) => (float[8, 4] y) { y = Gemm(x, v, w) }", WEIGHT),
    "not float": ("g (int32[2, 8] x) => (int32[2, 4] y) { y = MatMul(x, w) }", np.ones((8, 4), np.int32)),
}


@pytest.mark.parametrize("name", OTHER)
def test_others_stay(name: str) -> None:
    """What isn't a matrix that is only a second factor stays."""
    text, content = OTHER[name]
    model = parse(text, {"w": content, "v": numbers(8, 4)} if name == "a bias" else {"w": content})
    before = ir.to_proto(model).SerializeToString()
    graph_pass = TransposeWeights()
    graph_pass.prepare([model])
    if name == "a bias":  # the factor is transposed, and the matrix that is added is not
        graph_pass(model)
        np.testing.assert_array_equal(weight(model, "w"), content)
        return
    assert not graph_pass(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_tied_embedding_is_left_to_the_pass_before() -> None:
    """It is [vocabulary, width] already."""
    text = """g (float[n, m, 4] x, int64[n, k] ids) => (float[n, m, 8] y, float[n, k, 4] e)
    { e = Gather(w, ids) t = Transpose(w) y = MatMul(x, t) }"""
    model = parse(text, {"w": WEIGHT})
    graph_pass = TransposeWeights()
    graph_pass.prepare([model])
    FuseTransposedMatmul()(model)
    assert not graph_pass(model).modified
    np.testing.assert_array_equal(weight(model, "w"), WEIGHT)


def test_merged_branches_store_the_weight_once() -> None:
    """The branches of an `If` share what both multiply with, and compute what the single graphs do."""
    models, _ = transposed(LINEAR, LINEAR.replace("y = MatMul(x, w)", "p = MatMul(x, w) y = Neg(p)"))
    expected = INPUTS["x"] @ WEIGHT
    merged = merge_if(models[0], models[1], "enable_cache")
    (only,) = [value for value in initializers(merged) if value.const_value.size == WEIGHT.size]
    np.testing.assert_array_equal(weight(merged, only.name), WEIGHT.T)
    for value, sign in ((True, 1), (False, -1)):
        found = run(merged, {"x": INPUTS["x"], **flag(value)})
        np.testing.assert_allclose(found["y"], sign * expected, rtol=1e-5, atol=1e-6)


def test_content_is_read_one_weight_at_a_time() -> None:
    """A transposed weight is made when it is read, and not kept: a large model is never in memory twice."""
    (model,), _ = transposed(LINEAR)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.numpy() is not tensor.numpy()
