"""Trials of weight formats: which tokens they compare, and that errors at rare tokens are among them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel.adapters.types import Component, Signature, TensorSpec
from accel.config.schema import PrecisionConfig
from accel.evaluation import trial_calls
from accel.evaluation.calibration_data import Batch
from accel.evaluation.divergence import CONFIDENCE
from accel.evaluation.sensitivity import Recorder
from accel.evaluation.trial_calls import TEXT, TOKENS, counted_tokens, record_calls
from accel.evaluation.weight_trials import WeightTrial, WeightTrialResult
from accel.graph import files
from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.quantize_products import QuantizedWeights
from accel.runtime.session import SessionSettings
from accel.stages.weight_audit import breaches
from tests.graph import text

VOCABULARY, HIDDEN = 64, 64
RARE, END = 63, 62  # ids; END never comes where nothing ends
OUTLIERS = 200.0
SPECS = {
    component: Signature((TensorSpec("input_ids", dtype=torch.int64),), (TensorSpec("logits"),))
    for component in (Component.PREFILL, Component.DECODE)
}


@pytest.fixture
def bigrams(tmp_path: Path) -> Path:
    """Graphs of a model whose next token depends on the last one alone, and whose head spoils what follows `RARE`.

    The head's weights for the features of all other ids are 200 times as large as those for the features of `RARE`,
    which share their blocks, so that 8 bits round the latter to nothing. Greedy search never takes `RARE`: about one
    token of 60 is it, and each other id has one that follows it more often.
    """
    table = np.zeros((VOCABULARY, HIDDEN), np.float32)
    head = np.zeros((HIDDEN, VOCABULARY), np.float32)
    common, rare = slice(0, 31), slice(32, HIDDEN)
    table[:, common] = text.numbers(VOCABULARY, 31) / OUTLIERS
    head[common] = 0.3 * OUTLIERS * text.numbers(31, VOCABULARY, seed=1)
    table[:, 31] = 1 / OUTLIERS  # the input of the bias
    head[common, RARE] = 0  # its probability depends on the bias alone
    head[31, [RARE, END]] = 1.5 * OUTLIERS, -40 * OUTLIERS
    table[RARE] = 0
    table[RARE, rare] = text.numbers(1, 32, seed=2)
    head[rare] = 0.5 * text.numbers(32, VOCABULARY, seed=3)
    head[rare, [RARE, END]] = 0
    weights = {"table": table, "head": head}
    body = (
        "g (int64[b,n] input_ids) => (float[b,n,64] logits) { x = Gather (table, input_ids) logits = MatMul (x, head) }"
    )
    for component in SPECS:
        files.save(text.parse(body, weights), tmp_path / f"{component}.onnx")
    return tmp_path


def text_batches(count: int) -> Iterator[Batch]:
    """Batches of two texts of four ids each, without `RARE`, as someone would give who doesn't think of it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(END, (2, 4), generator=generator)
        yield Batch(TEXT, {}, ids, torch.ones_like(ids), ["", ""])


def trial(graphs: Path, recorder: Recorder) -> WeightTrialResult:
    """Result of the trial with the head in 8 bits."""
    settings, near_tie = SessionSettings(), PrecisionConfig("int8").max_divergence
    weight_trial = WeightTrial(graphs, recorder.calls, settings, QuantizedWeights(), (), (END,), near_tie)
    return weight_trial({"head": BlockFormat(8, 64)})


def record(graphs: Path, supply: Iterator[Batch], first: int, greedy_tokens: int = 0) -> Recorder:
    """Recorded calls of `first` batches, and of more of `supply` as they are needed."""
    work = [next(supply) for _ in range(first)]
    (graphs / "calls").mkdir()
    return record_calls(
        SPECS,
        work,
        supply,
        graphs,
        SessionSettings(),
        graphs / "calls",
        (END,),
        max_batches=64,
        greedy_tokens=greedy_tokens,
    )


def test_errors_at_rare_tokens_are_caught(bigrams: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though greedy continuations of the same texts show none of them."""
    precision = PrecisionConfig("int8")
    sampled = trial(bigrams, record(bigrams, text_batches(64), 4))
    assert TOKENS <= sampled.tokens <= 2 * TOKENS
    assert breaches(precision, sampled), sampled
    assert sampled.divergence - CONFIDENCE * sampled.standard_error > precision.max_divergence / 2
    (bigrams / "calls").rename(bigrams / "sampled")
    monkeypatch.setattr(torch, "multinomial", lambda odds, _, generator: odds.argmax(-1, keepdim=True))
    recorder = record(bigrams, text_batches(64), 4)
    greedy = trial(bigrams, recorder)
    assert greedy.tokens == sampled.tokens
    assert sampled.greedy_tokens == greedy.greedy_tokens == 512
    assert not breaches(precision, greedy)
    ids = torch.cat([load_file(call.path)["in.input_ids"] for call in recorder.calls[Component.DECODE]], dim=1)
    assert RARE not in ids
    assert len(ids.unique()) > 8


def test_texts_are_added_until_there_are_enough_tokens(bigrams: Path) -> None:
    """And no longer where they run out, or at the largest number of batches."""
    recorder = record(bigrams, text_batches(9), 2)
    assert len(recorder.kinds) == 8  # 2 rows of 4 + 32 tokens each
    assert trial(bigrams, recorder).tokens == 8 * 2 * 36
    (bigrams / "calls").rename(bigrams / "first")
    assert trial(bigrams, record(bigrams, text_batches(3), 2)).tokens == 3 * 2 * 36


def test_texts_are_added_until_there_are_enough_tokens_of_greedy_search(bigrams: Path) -> None:
    """Though the others are enough already. Random ids that count are continued as far as texts."""
    recorder = record(bigrams, (replace(batch, kind="random") for batch in text_batches(64)), 2, greedy_tokens=600)
    result = trial(bigrams, recorder)
    assert (len(recorder.kinds), result.greedy_tokens) == (10, 10 * 2 * 32)


def test_tokens_after_the_end_of_a_text_do_not_count() -> None:
    """Nor padding, nor the call of one token, whose token the call of all has again."""
    ids = torch.tensor([[5, 6, END, 7], [5, 6, 7, 8]])
    inputs = {"input_ids": ids}
    counted = counted_tokens(Component.DECODE, TEXT, inputs, (END,))
    assert counted.tolist() == [[True, True, False, False], [True] * 4]
    assert counted_tokens(Component.DECODE, "random", inputs, (END,)).all()
    assert not counted_tokens(Component.DECODE, TEXT, {"input_ids": ids[:, :1]}, (END,)).any()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    counted = counted_tokens(Component.PREFILL, TEXT, inputs | {"attention_mask": mask}, (END,))
    assert counted.tolist() == mask.bool().tolist()  # a chat's prompt holds ends of turns


def test_a_long_text_counts_by_evenly_spaced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_calls, "ROW_TOKENS", 4)
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    counted = counted_tokens(Component.PREFILL, TEXT, {"input_ids": ids, "attention_mask": mask}, ())
    assert [row.nonzero()[:, 0].tolist() for row in counted] == [[7, 8, 9], [0, 3, 6, 9]]


@pytest.mark.parametrize(
    ("result", "passed"),
    [
        (WeightTrialResult(512, 0.018, 0.001, 512, 40, 3, 0.0174, 0.1), True),
        (WeightTrialResult(512, 0.018, 0.0011, 512, 40, 3, 0.0174, 0.1), False),  # 0.0202 with two standard errors
        (WeightTrialResult(72, 0.0026, 0.01, 72, 1, 0, 0.05, 0.0), False),  # far below the limit, but on too few tokens
        (WeightTrialResult(512, 0.0, 0.0, 512, 4, 4, 0.0203, 0.0), False),
        (WeightTrialResult(512, 0.01, 0.001, 32, 1, 0, 0.11, 0.0), True),  # too few for a bound, but none is clear
        (WeightTrialResult(512, 0.01, 0.001, 32, 1, 1, 0.16, 0.0), False),
        (WeightTrialResult(512, 0.0, 0.0, 512, 0, 0, 0.0077, 0.101), False),
        (WeightTrialResult(512, float("inf"), float("inf"), 512, 0, 0, 0.0077, 0.0), False),
    ],
)
def test_limits_of_a_trial(result: WeightTrialResult, passed: bool) -> None:
    """Of the divergence with twice its standard error, of the share of clear changes, and of other outputs."""
    assert (not breaches(PrecisionConfig("int8"), result)) == passed


def test_a_trial_names_the_limits_that_it_breaks() -> None:
    """With the values that were compared: the divergence with twice its standard error, and limits after strictness."""
    result = WeightTrialResult(512, 0.004, 0.001, 512, 20, 1, 0.0113, 0.02)
    strict = replace(PrecisionConfig("int8"), strictness=4.0)
    assert breaches(strict, result) == ["0.006 exceeds max_divergence=0.005", "0.011 exceeds max_token_changes=0.005"]
    assert breaches(strict, replace(result, divergence=float("nan")))[0] == "nan exceeds max_divergence=0.005"
