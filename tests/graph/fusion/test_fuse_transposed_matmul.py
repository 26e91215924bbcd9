"""A tied embedding is looked up and multiplied with where it lies."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.fuse_transposed_matmul import FuseTransposedMatmul
from tests.graph.cleanup.test_fold_transposes import INPUTS, TIED, TWICE, WEIGHT
from tests.graph.text import numbers, parse, run

BRANCH = """g (float[n, m, 8] x, int64[n, k] ids, bool c) => (float[n, m, 4] y, float[n, k, 8] e)
{ e = Gather(linear, ids)
 y = If (c) <then_branch = t () => (float[n, m, 4] z) { turned = Transpose (linear)
 z = MatMul(x, turned) },
             else_branch = f () => (float[n, m, 4] u) { turned_too = Transpose <perm: ints = [1, 0]> (linear)
 p = MatMul(x, turned_too)
 u = Neg(p) }> }"""


def fused(text: str, **weights: np.ndarray) -> tuple[ir.Model, Counter[str]]:
    """The graph after the pass, its numbers checked against those before; and its operators."""
    inputs = [INPUTS | {"c": np.array(value)} for value in (True, False)]
    model = parse(text, weights or {"linear": WEIGHT})
    wanted = [value.name for value in model.graph.inputs]
    inputs = [{name: each[name] for name in wanted if name in each} for each in inputs]
    before = [run(model, each) for each in inputs]
    FuseTransposedMatmul()(model)
    for each, expected in zip(inputs, before, strict=True):
        found = run(model, each)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    return model, Counter(node.op_type for node in model.graph.all_nodes())


@pytest.mark.parametrize(("text", "products"), [(TIED, 1), (TWICE, 2), (BRANCH, 2)], ids=["tied", "twice", "branches"])
def test_no_transpose_is_left(text: str, products: int) -> None:
    """The weight stays as it is, and names stay."""
    model, found = fused(text)
    assert (found["Transpose"], found["MatMul"], found["FusedMatMul"]) == (0, 0, products)
    np.testing.assert_array_equal(model.graph.initializers["linear"].const_value.numpy(), WEIGHT)


TWICE_READ = TIED.replace("=> (float[n, m, 4] y,", "=> (float[n, m, 4] y, float[8, 4] z,").replace(
    "y = MatMul", "z = Neg(turned)\n y = MatMul"
)
OTHER = {
    "an activation": "g (float[2, 3, 8] x) => (float[2, 3, 3] y) { t = Transpose <perm: ints = [0, 2, 1]> (x)\n"
    " y = MatMul(x, t) }",
    "three axes": "g (float[2, 3, 8] x) => (float[2, 3, 4] y) { t = Transpose <perm: ints = [0, 2, 1]> (cube)\n"
    " y = MatMul(x, t) }",
    "the first factor": "g (float[2, 3, 8] x) => (float[8, 8] y) { t = Transpose (linear)\n y = MatMul(t, linear) }",
}


REASONS = {
    "an activation": "the transposed factor is not a weight",
    "three axes": "axes (0, 2, 1) of a weight of shape [2,4,8] are transposed",
    "the first factor": "",
}


@pytest.mark.parametrize("name", OTHER)
def test_others_stay(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What isn't a transposed weight as the second factor stays, and the log says why where it comes close."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    _, found = fused(OTHER[name], linear=WEIGHT, cube=numbers(2, 4, 8))
    assert (found["Transpose"], found["MatMul"], found["FusedMatMul"]) == (1, 1, 0)
    assert REASONS[name] in caplog.text


def test_a_transpose_that_others_read_stays_for_them() -> None:
    _, found = fused(TWICE_READ)
    assert (found["Transpose"], found["FusedMatMul"]) == (1, 1)
