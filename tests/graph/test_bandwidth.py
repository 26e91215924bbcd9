"""Bytes that a decode step must read."""

import numpy as np

from accel.graph.bandwidth import bytes_read
from tests.graph.text import parse

TEXT = """g (int64[batch, 1] ids, float16[batch, 2, past, 4] past_k, float[batch, source, 8] hidden)
    => (float[batch, 1, 16] y)
{
    row = Gather (table, ids)
    x = MatMul (row, weight)
    logits = MatMul (x, turned)
    y = Identity (logits)
}"""


def test_weights_and_caches() -> None:
    """Weights count once, lookup tables not at all, and of the inputs only caches, at the given lengths."""
    weights = {
        "table": np.zeros((100, 8), np.float32),
        "weight": np.zeros((8, 8), np.float32),
        "turned": np.zeros((8, 16), np.float32),
    }
    model = parse(TEXT, weights)
    found = bytes_read(model, ["past_k"], {"batch": 3, "past": 10, "source": 7})
    assert found == 4 * (8 * 8 + 8 * 16) + 2 * 3 * 2 * 10 * 4
    assert bytes_read(model, ["past_k", "hidden"], {"batch": 3, "past": 10, "source": 7}) == found + 4 * 3 * 7 * 8


def test_a_tied_head_is_read() -> None:
    """A lookup table that is also a factor of a product counts."""
    tied = "g (int64[n] ids) => (float[n, n] y) { x = Gather (table, ids)\n t = Transpose (table)\n y = MatMul (x, t) }"
    assert bytes_read(parse(tied, {"table": np.zeros((100, 8), np.float32)}), [], {}) == 4 * 100 * 8
