"""Extraction of the graph that computes the cross-attention caches."""

import numpy as np
import onnx_ir as ir

from accel.graph.decode.cross_cache import cross_cache
from tests.graph.text import numbers, parse, run, weight

WEIGHTS = {"k": numbers(4, 4), "v": numbers(4, 4, seed=1), "o": numbers(4, 4, seed=2)}
CACHE = {"past_own": "own", "past_cross": "cross"}
PREFILL = """
g (float[b, new, 4] x, float[b, source, 4] hidden)
=> (float[b, new, 4] y, float[b, new, 4] own, float[b, source, 4] cross)
{
    own = MatMul (x, k)
    small = Tanh (hidden)
    cross = MatMul (small, v)
    seen = ReduceMean <keepdims = 1> (cross)
    z = MatMul (own, o)
    y = Add (z, seen)
}
"""


def decode(cross: str) -> ir.Model:
    return parse(
        f"g (float[b, past, 4] past_own, float[b, {cross}, 4] past_cross) => (float[b, n, 4] y)"
        "{ y = Concat <axis = 1> (past_own, past_cross) }"
    )


def test_only_what_they_are_made_of() -> None:
    """The result has no other nodes, inputs and weights, and prefill is unchanged."""
    prefill = parse(PREFILL, WEIGHTS)
    inputs = {"x": numbers(2, 3, 4), "hidden": numbers(2, 5, 4)}
    whole = run(prefill, inputs)
    made = cross_cache(prefill, decode("source"), CACHE)
    assert made is not None
    assert [node.op_type for node in made.graph] == ["Tanh", "MatMul"]
    assert [value.name for value in made.graph.inputs] == ["hidden"]
    assert set(made.graph.initializers) == {"v"}
    assert np.array_equal(weight(made, "v"), WEIGHTS["v"])
    found = run(made, inputs)
    assert list(found) == ["cross"]
    assert np.array_equal(found["cross"], whole["cross"])
    for name, value in run(prefill, inputs).items():
        assert np.array_equal(value, whole[name])


def test_where_all_caches_grow() -> None:
    """A decoder without cross-attention caches has no such graph."""
    assert cross_cache(parse(PREFILL, WEIGHTS), decode("past"), CACHE) is None
