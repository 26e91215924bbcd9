"""Inputs of a merged decoder as other clients feed them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from accel.graph.merging.client_inputs import add_default, count_kept_logits, name_cache_lengths
from tests.graph.text import numbers, parse

GRAPH = """
decoder (int64[batch_size, new] input_ids, float[batch_size, new, 4] x, int64[kept] logits_to_keep,
         float[batch_size, 2, 50, 8] past_cross, float[batch_size, 2, past, 8] past_own)
    => (float[batch_size, kept, 4] logits, float[batch_size, 2, 50, 8] cross, float[batch_size, 2, past, 8] own) {
    logits = Gather <axis = 1> (x, logits_to_keep)
    cross = Identity (past_cross)
    own = Identity (past_own)
}
"""


@pytest.fixture
def model() -> ir.Model:
    graph = parse(GRAPH)
    assert count_kept_logits(graph, "logits_to_keep", "num_logits_to_keep")
    return graph


def answer(model: ir.Model, number: int | None = None) -> np.ndarray:
    """The logits; `number` is fed unless it is None."""
    inputs = {"input_ids": np.ones((2, 5), np.int64), "x": numbers(2, 5, 4)}
    inputs |= {"past_cross": numbers(2, 2, 50, 8), "past_own": numbers(2, 2, 0, 8)}
    if number is not None:
        inputs["num_logits_to_keep"] = np.array(number)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    logits: np.ndarray = session.run(["logits"], inputs)[0]
    return logits


@pytest.mark.parametrize("number", [0, 1, 3, 5, 9])
def test_the_last_tokens_are_kept(model: ir.Model, number: int) -> None:
    """All for 0, and for a number larger than there are tokens."""
    expected = numbers(2, 5, 4)[:, -number if 0 < number < 5 else 0 :]
    np.testing.assert_array_equal(answer(model, number), expected)


def test_the_number_has_a_default(model: ir.Model) -> None:
    """Nobody has to feed it, and who does is heard."""
    with pytest.raises(ValueError, match="Required inputs"):
        answer(model)
    add_default(model, "num_logits_to_keep", 0)
    np.testing.assert_array_equal(answer(model), numbers(2, 5, 4))
    np.testing.assert_array_equal(answer(model, 2), numbers(2, 5, 4)[:, -2:])


def test_graphs_without_the_input_stay() -> None:
    """A model whose head takes every token has no such input."""
    graph = parse("g (int64[b, n] input_ids) => (int64[b, n] y) { y = Identity (input_ids) }")
    assert not count_kept_logits(graph, "logits_to_keep", "num_logits_to_keep")
    assert [value.name for value in graph.graph.inputs] == ["input_ids"]


def test_constant_cache_lengths_get_a_name(model: ir.Model) -> None:
    """Those of caches only, and only where they have none."""
    name_cache_lengths(model, {"past_cross", "past_own"}, "encoder_length")
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in model.graph.inputs}
    assert shapes["past_cross"] == ["batch_size", "2", "encoder_length", "8"]
    assert shapes["past_own"] == ["batch_size", "2", "past", "8"]
    assert shapes["x"] == ["batch_size", "new", "4"]
