"""Nodes that don't depend on an input are evaluated once, and the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.cleanup.fold_constants import FoldConstants, MergeDuplicates, Simplify, StripMetadata
from accel.graph.files import node_count, weight_bytes
from accel.graph.passes import GraphPass
from tests.graph.text import numbers, parse, rewritten, run

WEIGHT = numbers(8, 4)
INPUTS = {"x": numbers(2, 8)}


def ops(model: ir.Model) -> list[str]:
    """Operators of the graph and its subgraphs, in order."""
    return [node.op_type for node in model.graph.all_nodes()]


def test_chain_of_constants_becomes_one() -> None:
    """Arithmetic on constants disappears, in subgraphs too; what depends on an input stays, numbers unchanged."""
    model = parse(
        """g (float[n, 8] x, bool c) => (float[n, 8] y) {
            two = Constant <value = float {2.0}> ()
            half = Reciprocal(two)
            root = Sqrt(half)
            copied = Identity(x)
            y = If (c) <
                then_branch = t () => (float[n, 8] z) { third = Constant <value = float {3.0}> ()
 cube = Mul(third, third)
 z = Mul(copied, cube) },
                else_branch = e () => (float[n, 8] z) { z = Mul(copied, root) }
            >
        }"""
    )
    inputs = [INPUTS | {"c": np.array(value)} for value in (True, False)]
    rewritten(FoldConstants(), [model], inputs, rtol=1e-6)
    assert sorted(ops(model)) == ["If", "Mul", "Mul"]


@pytest.mark.filterwarnings("error")
def test_no_warning_for_branches_that_a_where_ignores() -> None:
    """Such as log(0) in T5's relative positions."""
    model = parse(
        """g (float[n, 3] x) => (float[n, 3] y) {
            far = Constant <value = float[3] {0.0, 1.0, 1.0}> ()
            one = Constant <value = float {1.0}> ()
            near = Less(far, one)
            log = Log(far)
            whole = Cast <to = 7> (log)
            real = Cast <to = 1> (whole)
            most = Where(near, far, real)
            y = Add(x, most)
        }"""
    )
    FoldConstants()(model)
    assert ops(model) == ["Add"]
    x = numbers(2, 3)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x)


def test_weights_are_left_alone() -> None:
    """A weight's `Transpose` is not folded here: it would become a second copy beside a tied embedding."""
    model = parse(
        """g (float[n, 8] x, int64[n, m] ids) => (float[n, 4] y, float[n, m, 4] e)
        { t = Transpose <perm: ints = [1, 0]> (turned)
 y = MatMul(x, t)
 e = Gather(t, ids) }""",
        {"turned": np.ascontiguousarray(WEIGHT.T)},
    )
    FoldConstants()(model)
    assert "Transpose" in ops(model)
    assert weight_bytes(model) == WEIGHT.nbytes
    assert list(model.graph.initializers) == ["turned"]


@pytest.mark.parametrize("graph_pass", [FoldConstants(), Simplify(), MergeDuplicates(), StripMetadata()])
def test_pass_keeps_names_weights_and_numbers(graph_pass: GraphPass) -> None:
    """No pass renames a weight, an input or an output, loses a dimension or changes a number."""
    model = parse(
        """g (float[batch, 8] x) => (float[batch, 4] y) {
            same = Cast <to: int = 1> (x)
            first = MatMul(same, w)
            second = MatMul(same, w)
            y = Add(first, second)
        }""",
        {"w": WEIGHT},
    )
    rewritten(graph_pass, [model], [INPUTS], rtol=1e-6)
    rewritten(graph_pass, [model], [INPUTS], rtol=1e-6)  # reports no change where none is left to make
    assert model.graph.initializers["w"].const_value is not None
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "8"]


def test_simplify_and_merge_duplicates() -> None:
    """A cast that changes nothing and a product computed twice are removed."""
    text = """g (float[n, 8] x) => (float[n, 4] y) {
        same = Cast <to: int = 1> (x)
        first = MatMul(same, w)
        second = MatMul(same, w)
        y = Add(first, second)
    }"""
    model = parse(text, {"w": WEIGHT})
    Simplify()(model)
    assert ops(model) == ["MatMul", "MatMul", "Add"]
    MergeDuplicates()(model)
    assert ops(model) == ["MatMul", "Add"]
    assert node_count(model) == 2


@pytest.mark.parametrize("graph_pass", [FoldConstants(), Simplify(), MergeDuplicates(), StripMetadata()])
def test_every_change_is_reported(graph_pass: GraphPass) -> None:
    """Also where only an unused optional output, an operator set or a documentation string is removed."""
    model = parse("g (float[n, 8] x) => (float[n, 8] y) { y, mask = Dropout (x) }")
    node = model.graph[0]
    node.doc_string = "somewhere"
    rewritten(graph_pass, [model], [INPUTS])


def test_metadata_is_dropped() -> None:
    """Stack traces of the exporter are removed, from nodes in subgraphs as well."""
    model = parse(
        """g (float[n] x, bool c) => (float[n] y) {
            y = If (c) <then_branch = t () => (float[n] z) { z = Neg(x) },
                        else_branch = e () => (float[n] z) { z = Abs(x) }>
        }"""
    )
    for node in model.graph.all_nodes():
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "…"
        node.doc_string = "somewhere"
    assert StripMetadata()(model).modified
    assert not any(node.metadata_props or node.doc_string for node in model.graph.all_nodes())
