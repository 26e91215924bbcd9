"""accel's decoding loops generate the tokens of transformers' loops, and stop within the poll lag."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessorList, MaxTimeCriteria, TextStreamer

from accel import testing
from accel.models.cache import state_of
from accel.models.decoding import stop_poller
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.testing import checks
from tests.conftest import Build

TEXTS = ["speculative", "a", "photosynthesis", "immunex"]  # their outputs have different lengths
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "cut off": {"max_new_tokens": 4},
    "least length": {"min_new_tokens": 20, "max_new_tokens": 24},
    "repetition": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [5, 6, 7], "bad_words_ids": [[9], [10, 11]]},
    "two ends": {"eos_token_id": [1, 20]},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.95},
    "samples": {"do_sample": True, "num_return_sequences": 3, "min_p": 0.01},
    "beams": {"num_beams": 4},
    "all beams": {"num_beams": 4, "num_return_sequences": 4},
    "early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    "never early": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "short ones": {"num_beams": 3, "length_penalty": -3.0, "num_return_sequences": 3},
    "beams cut off": {"num_beams": 4, "max_new_tokens": 5, "num_return_sequences": 4},
    "beams with two ends": {"num_beams": 3, "eos_token_id": [1, 20], "num_return_sequences": 3},
    "beams, least length": {"num_beams": 3, "min_new_tokens": 12, "repetition_penalty": 1.5},
    "beam-sample": {"num_beams": 3, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model(build: Build) -> Iterator[AcceleratedModel]:
    """The embedded model: it is trained, so its sequences end."""
    with load(build("accel://t5-g2p", "verify")[1]["verify"].folder, runtime="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def batch(build: Build) -> dict[str, torch.Tensor]:
    """Padded inputs for `TEXTS`."""
    tokenizer = AutoTokenizer.from_pretrained(build("accel://t5-g2p", "merge")[1]["merge"].folder)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def generate_with_both_loops(
    model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, Any]:
    """Return the results of transformers' loop and of accel's, over the same model and from the same seed."""
    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        patch.setattr(AcceleratedModel, "_supports", lambda *_: False)
        expected = model.generate(**options)
    torch.manual_seed(11)
    return expected, model.generate(**options)


@pytest.mark.parametrize("lag", [0, 5], ids=["no lag", "lag"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_equal(
    model: AcceleratedModel,
    batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    lag: int,
) -> None:
    """Tokens and padding are transformers', without a poll lag, as on the CPU, and with one, as on a GPU."""
    monkeypatch.setattr(stop_poller, "poll_lag", lambda device: lag)
    with caplog.at_level(logging.INFO, "accel.decoding"):
        expected, found = generate_with_both_loops(model, monkeypatch, **batch, **({"max_new_tokens": 40} | options))
    assert caplog.messages == ["decoding in accel"]
    assert torch.equal(found, expected), (found.tolist(), expected.tolist())
    assert len({tuple(row) for row in found.tolist()}) >= len(TEXTS)


def test_lengths_differ(model: AcceleratedModel, batch: dict[str, torch.Tensor]) -> None:
    """Rows of one batch end at different lengths below the limit, so that the other tests compare padding too."""
    found = model.generate(**batch, max_new_tokens=40)
    lengths = (found != 0).sum(-1)
    assert len(set(lengths.tolist())) > 2
    assert found.shape[1] < 30


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_decode_steps_after_the_end(
    model: AcceleratedModel,
    batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    """As many decode steps as the poll lag run after the end."""
    decode, lengths = model.runtime.decode, []

    def recorded_decode(inputs: Any, state: Any) -> torch.Tensor:
        lengths.append(state.length)
        return decode(inputs, state)

    monkeypatch.setattr(model.runtime, "decode", recorded_decode)
    ends = []
    for lag in (None, 0, 5):  # None: transformers' loop
        with monkeypatch.context() as patch:
            if lag is None:
                patch.setattr(AcceleratedModel, "_supports", lambda *_: False)
            patch.setattr(stop_poller, "poll_lag", lambda device, lag=lag: lag)
            model.generate(**batch, max_new_tokens=60, **options)
        ends.append(lengths[-1])
    assert ends == [ends[0], ends[0], ends[0] + 5]


def test_returned_caches(
    model: AcceleratedModel, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches that `generate` returns hold the generated tokens, without those computed after the end."""
    monkeypatch.setattr(stop_poller, "poll_lag", lambda device: 5)
    first = {name: value[:1] for name, value in batch.items()}
    expected, found = generate_with_both_loops(
        model, monkeypatch, **first, max_new_tokens=60, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences, expected.sequences)
    ours_state, theirs_state = state_of(found.past_key_values), state_of(expected.past_key_values)
    assert ours_state is not None
    assert theirs_state is not None
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for ours, theirs in zip(ours_state.views().values(), theirs_state.views().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=str)
def test_positions_of_a_decoder_only_model(
    gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Positions from a mask, without one, and given by the caller."""
    without_mask = {"input_ids": gpt2.ids(2, 7)}
    shifted = without_mask | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    shifted["position_ids"] = torch.arange(200, 207).repeat(2, 1)
    results, settings = [], {"max_new_tokens": 9, "no_repeat_ngram_size": 1, **options}
    for inputs in (gpt2.inputs(3), without_mask, shifted):
        expected, found = generate_with_both_loops(gpt2.model, monkeypatch, **inputs, **settings)
        assert torch.equal(found, expected)
        results.append(found[:, -9:].tolist())
    assert results[1] != results[2]


def test_frequencies_of_samples(gpt2: testing.Subject) -> None:
    """Temperature and top-k: over 4,000 draws each token has the frequency that its probability predicts."""
    draws, temperature, top_k = 4000, 1.7, 12
    ids = gpt2.ids(1, 7)
    with torch.no_grad():
        logits = gpt2.eager(ids).logits[0, -1] / temperature
    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1)
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": 1}
    found = gpt2.model.generate(ids, num_return_sequences=draws, **options)[:, -1]
    shares = found.bincount(minlength=len(expected)) / draws
    assert (expected > 0.01).sum() > 5
    assert bool((shares[expected == 0] == 0).all())
    spread = (expected * (1 - expected) / draws).sqrt()
    assert bool(((shares - expected).abs() <= 4 * spread).all()), (shares - expected).abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([checks.OddOnly()])}, "OddOnly"),
        ({"stopping_criteria": [MaxTimeCriteria(60)]}, "MaxTimeCriteria"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"return_dict_in_generate": True, "num_beams": 2}, "return_dict_in_generate with beams"),
        ({"use_cache": False}, "use_cache=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_loops_are_used_where_needed(
    model: AcceleratedModel,
    batch: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    reason: str,
) -> None:
    """A log line gives the reason why accel's loops weren't used, and the generation succeeds."""
    with caplog.at_level(logging.INFO, "accel.decoding"):
        found = model.generate(**batch, max_new_tokens=6, **options)
    assert caplog.messages == [f"decoding in transformers: {reason}"]
    assert len(getattr(found, "sequences", found)) == len(TEXTS)


def test_streamer_gets_every_token(model: AcceleratedModel, batch: dict[str, torch.Tensor]) -> None:
    streamed: list[torch.Tensor] = []

    class CollectingStreamer(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: torch.Tensor) -> None:
            streamed.append(value)

        def end(self) -> None:
            pass

    first = {name: value[:1] for name, value in batch.items()}
    found = model.generate(**first, max_new_tokens=9, streamer=CollectingStreamer())
    assert torch.cat([value.flatten() for value in streamed]).tolist() == found[0].tolist()
