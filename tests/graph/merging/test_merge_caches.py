"""Merge strategy shared: an `If` around the cross-attention caches, everything else once."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from accel.graph.files import node_count, weight_bytes
from accel.graph.merging.merge_caches import merge_caches
from tests.graph.text import Arrays, flag, numbers, parse, run

FLAG = "enable_cache"
CACHE = {"past_own": "own", "past_key": "key", "past_value": "value"}

# Attention over an encoder's output: its key goes through Transpose and MatMul, and through Shape into the mask.
ATTEND = """
    query = MatMul(x, w_query)
    joined = Concat <axis: int = 1> ({past}, query)
    pooled = ReduceSum <keepdims: int = 1> (joined, axis)
    turned = Transpose <perm: ints = [0, 2, 1]> ({key})
    scores = MatMul(query, turned)
    shape = Shape ({key})
    length = Gather <axis: int = 0> (shape, one)
    size = Cast <to: int = 1> (length)
    scaled = Div(scores, size)
    weights = Softmax <axis: int = -1> (scaled)
    read = MatMul(weights, {value})
    mixed = Add(read, pooled)
    logits = MatMul(mixed, head)
    own = Identity(joined)
"""
DECODE = (
    "decode (float[batch, new, 4] x, float[batch, past, 4] past_own, float[batch, source, 4] past_key,"
    " float[batch, source, 4] past_value) => (float[batch, new, 3] logits, float[batch, total, 4] own) {"
    + ATTEND.format(past="past_own", key="past_key", value="past_value")
    + "}"
)
PREFILL = (
    "prefill (float[batch, new, 4] x, float[batch, source, 4] context) => (float[batch, new, 3] logits,"
    " float[batch, total, 4] own, float[batch, source, 4] key, float[batch, source, 4] value) {"
    "    key = MatMul(context, w_key)\n    value = MatMul(context, w_value)\n"
    "    empty = Slice (x, zero, zero, axis)\n" + ATTEND.format(past="empty", key="key", value="value") + "}"
)
WEIGHTS = {"w_query": numbers(4, 4), "head": numbers(4, 3), "axis": np.array([1]), "one": np.array(1)}
MAKES = {"w_key": numbers(4, 4, seed=1), "w_value": numbers(4, 4, seed=2), "zero": np.array([0])}
USED = ("w_query", "head", "w_key", "w_value")
INPUTS = {
    "x": numbers(2, 3, 4),
    "context": numbers(2, 5, 4),
    "past_own": numbers(2, 7, 4),
    "past_key": numbers(2, 6, 4),
    "past_value": numbers(2, 6, 4, seed=5),
}
NO_PAST = INPUTS | {name: np.zeros((2, 0, 4), np.float32) for name in CACHE}


def decode() -> ir.Model:
    return parse(DECODE, WEIGHTS)


def prefill() -> ir.Model:
    return parse(PREFILL, WEIGHTS | MAKES)


def assert_close(found: Arrays, expected: Arrays) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def users(model: ir.Model, name: str) -> list[ir.Node]:
    """Return the nodes that read weight `name`, in the graph or a subgraph."""
    weight = model.graph.initializers[name]
    return [node for node in model.graph.all_nodes() if weight in node.inputs]


def test_each_side_gives_its_graphs_numbers() -> None:
    """With past: the decode graph's results, empty cross caches. Without: prefill's, given a past of length 0."""
    expected = run(decode(), INPUTS), run(prefill(), INPUTS)
    merged = merge_caches(decode(), prefill(), FLAG, CACHE)
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    with_past, without_past = run(merged, INPUTS | flag(True)), run(merged, NO_PAST | flag(False))
    assert list(with_past) == ["logits", "own", "key", "value"]
    assert_close(with_past, expected[0])
    assert_close(without_past, expected[1])
    assert with_past["key"].shape == with_past["value"].shape == (0, 0, 4)


def test_two_calls_in_a_row_equal_one() -> None:
    """Prefill and a decode step after it give what prefill alone gives for all tokens."""
    inputs = {name: INPUTS[name] for name in ("x", "context")}
    whole = run(prefill(), inputs)
    merged = merge_caches(decode(), prefill(), FLAG, CACHE)
    first = run(merged, NO_PAST | {"x": inputs["x"][:, :2]} | flag(False))
    past = {name: first[source] for name, source in CACHE.items()}
    second = run(merged, past | {"x": inputs["x"][:, 2:], "context": inputs["context"]} | flag(True))
    np.testing.assert_allclose(second["own"], whole["own"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second["logits"][:, 0], whole["logits"][:, 2], rtol=1e-5, atol=1e-6)


def test_weights_and_products_stand_once() -> None:
    """Every weight is stored once and read by one node, which is the purpose of this strategy."""
    merged = merge_caches(decode(), prefill(), FLAG, CACHE)
    assert weight_bytes(merged) <= sum(array.nbytes for array in (WEIGHTS | MAKES).values())
    assert {name: len(users(merged, name)) for name in USED} == dict.fromkeys(USED, 1)
    assert node_count(merged) < node_count(decode()) + node_count(prefill())


def test_the_encoders_output_is_not_projected_with_past() -> None:
    """With past, the products that compute the cross caches must not run: they belong to a branch."""
    merged = merge_caches(decode(), prefill(), FLAG, CACHE)
    for name in ("w_key", "w_value"):
        (user,) = users(merged, name)
        assert user.graph is not merged.graph
    poisoned = INPUTS | {"context": np.full((2, 5, 4), np.nan, np.float32)} | flag(True)
    assert np.isfinite(run(merged, poisoned)["logits"]).all()


def test_past_is_not_read_without_past() -> None:
    """Without past, the contents of the cross-cache inputs make no difference."""
    merged = merge_caches(decode(), prefill(), FLAG, CACHE)
    junk = {name: np.full((2, 9, 4), np.nan, np.float32) for name in ("past_key", "past_value")}
    assert_close(run(merged, NO_PAST | junk | flag(False)), run(merged, NO_PAST | flag(False)))


def test_dimensions_types_and_names() -> None:
    """Inputs are those of both graphs, outputs are prefill's in its order, and no two values share a name."""
    merged = merge_caches(decode(), prefill(), "use_cache_branch", CACHE)
    inputs = {value.name: [str(dim) for dim in value.shape] for value in merged.graph.inputs if value.shape is not None}
    assert inputs == {
        "x": ["batch", "new", "4"],
        "context": ["batch", "source", "4"],
        **{name: ["batch", "past" if name == "past_own" else "source", "4"] for name in CACHE},
        "use_cache_branch": [],
    }
    assert [value.name for value in merged.graph.outputs] == ["logits", "own", "key", "value"]
    values = [value.name for node in merged.graph.all_nodes() for value in node.outputs if value.name]
    assert len(values) == len(set(values))


CHOICE = """If ({condition}) <
        then_branch = yes () => (float[batch, {length}, 4] picked) {{ picked = {first} }},
        else_branch = no () => (float[batch, {length}, 4] picked) {{ picked = {second} }}
    >"""


def test_subgraph_of_a_graphs_own() -> None:
    """An `If` in the decode graph that reads outer values is kept as it is."""
    selector = CHOICE.format(condition="few", length="new", first="Add(read, pooled)", second="Sub(read, pooled)")
    nested = DECODE.replace("mixed = Add(read, pooled)", f"few = Greater(length, one)\n mixed = {selector}\n")
    assert nested != DECODE
    merged = merge_caches(parse(nested, WEIGHTS), prefill(), FLAG, CACHE)
    assert_close(run(merged, INPUTS | flag(True)), run(parse(nested, WEIGHTS), INPUTS))
    assert_close(run(merged, NO_PAST | flag(False)), run(prefill(), INPUTS))


def test_cache_captured_by_a_subgraph_is_refused() -> None:
    """A cache that a subgraph reads can't be replaced by an `If`: the message names the cache."""
    selector = CHOICE.format(
        condition="few", length="new", first="MatMul(weights, past_value)", second="MatMul(weights, past_key)"
    )
    nested = DECODE.replace("read = MatMul(weights, past_value)", f"few = Greater(length, one)\n read = {selector}\n")
    with pytest.raises(ValueError, match=r"past_(key|value).*subgraph"):
        merge_caches(parse(nested, WEIGHTS), prefill(), FLAG, CACHE)


def test_cache_made_by_a_subgraph_is_refused() -> None:
    """A cache that prefill computes in an `If` can't be copied: outer values it reads would be lost."""
    selector = CHOICE.format(condition="few", length="source", first="Neg(made)", second="Abs(made)")
    making = f"made = MatMul(context, w_value)\n few = Greater(one, none)\n value = {selector}\n"
    nested = PREFILL.replace("value = MatMul(context, w_value)\n", making)
    graph = parse(nested, WEIGHTS | MAKES | {"none": np.array(0)})
    with pytest.raises(ValueError, match=r"'value'.*subgraph"):
        merge_caches(decode(), graph, FLAG, CACHE)


def test_what_cannot_be_merged_is_named() -> None:
    """Prefill's output without a cache input, a cache that is never read, a flag name that is taken, an old opset."""
    with pytest.raises(ValueError, match="'value'"):
        merge_caches(decode(), prefill(), FLAG, {"past_own": "own", "past_key": "key"})
    unread = parse(DECODE.replace("MatMul(weights, past_value)", "MatMul(weights, past_key)"), WEIGHTS)
    with pytest.raises(ValueError, match="'past_value'"):
        merge_caches(unread, prefill(), FLAG, CACHE)
    with pytest.raises(ValueError, match="'x'"):
        merge_caches(decode(), prefill(), "x", CACHE)
    old = parse(DECODE, WEIGHTS, '<ir_version: 10, opset_import: ["": 18]>')
    with pytest.raises(ValueError, match="18"):
        merge_caches(old, prefill(), FLAG, CACHE)


def test_nodes_of_both_graphs_may_have_the_same_names() -> None:
    """Nodes of both graphs meet in one branch, and exporters number the nodes of each graph from 0."""

    def numbered(model: ir.Model, first: int) -> ir.Model:
        outputs = set(model.graph.outputs)
        for number, node in enumerate(model.graph, first):
            node.name = f"node_{number}"
            for value in node.outputs:
                if value not in outputs:
                    value.name = f"val_{number}"
        return model

    made = PREFILL.replace("key = MatMul(context, w_key)", "early = MatMul(context, w_key)\n key = Identity(early)")
    source = numbered(parse(made, WEIGHTS | MAKES), 3)  # the number of the decode graph's first node that reads a cache
    merged = merge_caches(numbered(decode(), 0), source, FLAG, CACHE)
    for graph in merged.graphs():
        if graph is not merged.graph:
            names = [node.name for node in graph]
            assert len(set(names)) == len(names)
            values = [value.name for node in graph for value in node.outputs]
            assert len(set(values)) == len(values)
    found = run(merged, NO_PAST | flag(False))
    for name, expected in run(parse(PREFILL, WEIGHTS | MAKES), INPUTS).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
