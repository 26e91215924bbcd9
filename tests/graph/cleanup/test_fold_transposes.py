"""Weights are stored the way they are used, alike in every graph that shares them."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.cleanup.fold_transposes import FoldTransposes
from accel.graph.passes import run_pass
from accel.graph.weights import fingerprint, initializers, shared_bytes
from tests.graph.text import Arrays, numbers, parse, run

WEIGHT = numbers(4, 8)  # [out, in], as torch.nn.Linear keeps it
INPUTS = {"x": numbers(2, 3, 8), "ids": np.array([[0, 3, 1]])}

LINEAR = """g (float[n, m, 8] x) => (float[n, m, 4] y)
{ turned = Transpose <perm: ints = [1, 0]> (linear)
 y = MatMul(x, turned) }"""
TWICE = """g (float[n, m, 8] x) => (float[n, m, 4] y)
{ turned = Transpose <perm: ints = [1, 0]> (linear)
 again = Transpose (linear)
 first = MatMul(x, turned)
 second = MatMul(x, again)
 y = Add(second, first) }"""
TIED = """g (float[n, m, 8] x, int64[n, k] ids) => (float[n, m, 4] y, float[n, k, 8] e)
{ e = Gather(linear, ids)
 turned = Transpose <perm: ints = [1, 0]> (linear)
 y = MatMul(x, turned) }"""


def folded(*texts: str) -> list[ir.Model]:
    """The graphs after the pass, with every number checked against those before."""
    models = [parse(text, {"linear": WEIGHT}) for text in texts]
    before: list[Arrays] = [run(model, INPUTS) for model in models]
    run_pass(FoldTransposes(), models)
    for model, expected in zip(models, before, strict=True):
        found = run(model, INPUTS)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    return models


def transposes(model: ir.Model) -> int:
    return sum(node.op_type == "Transpose" for node in model.graph.all_nodes())


def test_weight_used_transposed_by_all_is_stored_transposed() -> None:
    """No `Transpose` is left, the weight keeps its name and bytes, and both graphs hold the same content."""
    first, second = folded(LINEAR, LINEAR.replace("y = ", "z = MatMul(x, turned)\n y = Neg(z)\n u = "))
    for model in (first, second):
        assert transposes(model) == 0
        weight = model.graph.initializers["linear"].const_value
        assert weight is not None
        np.testing.assert_array_equal(weight.numpy(), WEIGHT.T)
    assert shared_bytes(initializers(first), initializers(second)) == WEIGHT.nbytes


def test_weight_used_both_ways_stays() -> None:
    """A tied embedding in one graph keeps the weight as it is in all of them, so that they still share it."""
    tied, plain = folded(TIED, LINEAR)
    assert (transposes(tied), transposes(plain)) == (1, 1)
    marks = {fingerprint(value) for model in (tied, plain) for value in initializers(model)}
    assert len(marks) == 1
    np.testing.assert_array_equal(tied.graph.initializers["linear"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize("order", [(LINEAR, TIED), (TIED, LINEAR)])
def test_order_of_the_graphs_does_not_matter(order: tuple[str, str]) -> None:
    """The graph that needs the weight as it is may come first or last."""
    assert [transposes(model) for model in folded(*order)] == [1, 1]


def test_two_users_in_one_graph() -> None:
    """Two transposes of one weight, one with its order spelled out and one by default, mean the same order."""
    first, second = folded(TWICE, LINEAR)
    assert shared_bytes(initializers(first), initializers(second)) == WEIGHT.nbytes


def test_two_graphs_that_transpose_differently_keep_sharing() -> None:
    """One graph uses axes (0, 2, 1) and the other (2, 1, 0): neither may be changed, or the bytes would differ."""
    cube = numbers(3, 3, 3)
    texts = [
        "g (float[3, 3, 3] x) => (float[3, 3, 3] y) "
        f"{{ t = Transpose <perm: ints = [{perm}]> (linear)\n y = Mul(x, t) }}"
        for perm in ("0, 2, 1", "2, 1, 0")
    ]
    models = [parse(text, {"linear": cube}) for text in texts]
    inputs = {"x": numbers(3, 3, 3, seed=1)}
    before = [run(model, inputs)["y"] for model in models]
    run_pass(FoldTransposes(), models)
    for model, expected in zip(models, before, strict=True):
        np.testing.assert_array_equal(run(model, inputs)["y"], expected)
    assert shared_bytes(initializers(models[0]), initializers(models[1])) == cube.nbytes


def test_transposed_weight_that_is_an_output_or_used_in_a_subgraph() -> None:
    """A transposed weight read inside a branch, and one returned as it is, still give the right numbers."""
    branch = """g (float[n, m, 8] x, bool c) => (float[n, m, 4] y)
    { turned = Transpose <perm: ints = [1, 0]> (linear)
 y = If (c) <then_branch = t () => (float[n, m, 4] z) { z = MatMul(x, turned) },
             else_branch = e () => (float[n, m, 4] z) { inner = Transpose <perm: ints = [1, 0]> (linear)
 p = MatMul(x, inner)
 z = Neg(p) }> }"""
    model = parse(branch, {"linear": WEIGHT})
    inputs = [INPUTS | {"c": np.array(value)} for value in (True, False)]
    before = [run(model, each)["y"] for each in inputs]
    run_pass(FoldTransposes(), [model])
    for each, expected in zip(inputs, before, strict=True):
        np.testing.assert_allclose(run(model, each)["y"], expected, rtol=1e-5, atol=1e-6)
    returned = parse(
        "g (float[n, 8] x) => (float[n, 4] y, float[8, 4] t) "
        "{ t = Transpose <perm: ints = [1, 0]> (linear)\n y = MatMul(x, t) }",
        {"linear": WEIGHT},
    )
    run_pass(FoldTransposes(), [returned])
    found = run(returned, {"x": INPUTS["x"][0]})
    np.testing.assert_array_equal(found["t"], WEIGHT.T)
