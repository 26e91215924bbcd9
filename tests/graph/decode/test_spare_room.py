"""The number of past tokens comes from the mask where attention alone reads the caches."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.spare_room import SpareRoom, has_spare_room
from tests.graph.text import numbers, parse, run

ATTENTION = """
    length = Shape <start: int = 2, end: int = 3> (past_key)
    batch = Shape <start: int = 0, end: int = 1> (past_key)
    y, key, value = com.microsoft.GroupQueryAttention <num_heads: int = 2, kv_num_heads: int = 1> (
        q, k, v, past_key, past_value, last, total)
"""
INPUTS = """int64[b, new] input_ids, int64[b, all] attention_mask, float[b, new, 16] q, float[b, new, 8] k,
    float[b, new, 8] v, float[b, 1, past, 8] past_key, float[b, 1, past, 8] past_value, int32[b] last, int32[1] total"""
OUTPUTS = "float[b, new, 16] y, float[b, 1, t, 8] key, float[b, 1, t, 8] value, int64[1] length, int64[1] batch"
CACHES = ("past_key", "past_value")


def graph(more: str = "", outputs: str = OUTPUTS, inputs: str = INPUTS) -> ir.Model:
    return parse(f"g ({inputs}) => ({outputs}) {{ {ATTENTION} {more} }}")


def arrays(batch: int, new: int, past: int, spare: int = 0) -> dict[str, np.ndarray]:
    total = past + new
    rows = {name: numbers(batch, new, width) for name, width in (("q", 16), ("k", 8), ("v", 8))}
    caches = {name: numbers(batch, 1, past + spare, 8, seed=len(name)) for name in CACHES}
    return {
        "input_ids": np.ones((batch, new), np.int64),
        "attention_mask": np.ones((batch, total), np.int64),
        "last": np.full(batch, total - 1, np.int32),
        "total": np.array([total], np.int32),
        **rows,
        **caches,
    }


@pytest.mark.parametrize(("batch", "new", "past"), [(1, 1, 5), (2, 1, 3), (1, 4, 2)])
def test_caches_may_be_longer(batch: int, new: int, past: int) -> None:
    """With spare room behind the past tokens, attention and lengths are what they were without it."""
    model = graph()
    exact = arrays(batch, new, past)
    before = run(model, exact)
    assert SpareRoom("past", "attention_mask", "input_ids")(model).modified
    assert has_spare_room(model.graph, CACHES)
    longer = arrays(batch, new, past, spare=6)
    for name in CACHES:
        longer[name][:, :, :past] = exact[name]
    after = run(model, longer)
    for name in ("y", "length", "batch"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(after["key"][:, :, : past + new], before["key"])


def test_another_reader_of_a_cache() -> None:
    """Where anything else reads a cache, it would see the spare room: the graph stays."""
    model = graph("sum = ReduceSum (past_value)", f"{OUTPUTS}, float[1, 1, 1, 1] sum")
    assert not SpareRoom("past", "attention_mask", "input_ids")(model).modified
    assert not has_spare_room(model.graph, CACHES)


def test_without_a_mask() -> None:
    """Nothing else tells the number of past tokens."""
    model = graph(inputs=INPUTS.replace("int64[b, all] attention_mask,", ""))
    assert not SpareRoom("past", "attention_mask", "input_ids")(model).modified
    assert not has_spare_room(model.graph, CACHES)
