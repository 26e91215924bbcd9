"""Our decoding loops say what transformers' own do, and go on after the end no longer than they promise."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessorList, MaxTimeCriteria, TextStreamer

from accel import testing
from accel.models.decoding import stop_poller
from accel.models.generation import AcceleratedModel, StateCache
from accel.models.loading import load
from accel.testing import checks
from tests.conftest import Build

WORDS = ["speculative", "a", "photosynthesis", "immunex"]  # which end at different lengths
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
    """The embedded model: trained, so that its sequences end."""
    with load(build("accel://t5-g2p", "verify")[1]["verify"].folder, runtime="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def words(build: Build) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(build("accel://t5-g2p", "merge")[1]["merge"].folder)
    return dict(tokenizer(WORDS, padding=True, return_tensors="pt"))


def both(model: AcceleratedModel, patch: pytest.MonkeyPatch, **given: Any) -> tuple[Any, Any]:
    """What transformers' loop says over this model, and what ours does, from the same seed."""
    torch.manual_seed(11)
    with patch.context() as theirs:
        theirs.setattr(AcceleratedModel, "_supports", lambda *_: False)
        expected = model.generate(**given)
    torch.manual_seed(11)
    return expected, model.generate(**given)


@pytest.mark.parametrize("late", [0, 5], ids=["at once", "late"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_words(
    model: AcceleratedModel,
    words: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    late: int,
) -> None:
    """Tokens and padding are transformers', whether the end is noticed at once, as on a CPU, or later, as on a GPU."""
    monkeypatch.setattr(stop_poller, "poll_lag", lambda device: late)
    with caplog.at_level(logging.INFO, "accel.decoding"):
        expected, found = both(model, monkeypatch, **words, **({"max_new_tokens": 40} | options))
    assert caplog.messages == ["decoding in accel"]
    assert torch.equal(found, expected), (found.tolist(), expected.tolist())
    assert len({tuple(row) for row in found.tolist()}) >= len(WORDS)


def test_lengths_differ(model: AcceleratedModel, words: dict[str, torch.Tensor]) -> None:
    """What the comparison stands on: rows of one batch end at different tokens, well before the largest length."""
    found = model.generate(**words, max_new_tokens=40)
    lengths = (found != 0).sum(-1)
    assert len(set(lengths.tolist())) > 2
    assert found.shape[1] < 30


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_steps_in_vain(
    model: AcceleratedModel,
    words: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    """As many steps after the end as the watch is late, and none where it isn't."""
    decode, seen = model.runtime.decode, []

    def counted(inputs: Any, state: Any) -> torch.Tensor:
        seen.append(state.length)
        return decode(inputs, state)

    monkeypatch.setattr(model.runtime, "decode", counted)
    ends = []
    for late in (None, 0, 5):
        with monkeypatch.context() as patch:
            if late is None:
                patch.setattr(AcceleratedModel, "_supports", lambda *_: False)
            patch.setattr(stop_poller, "poll_lag", lambda device, late=late: late)
            model.generate(**words, max_new_tokens=60, **options)
        ends.append(seen[-1])
    assert ends == [ends[0], ends[0], ends[0] + 5]


def test_a_state_to_go_on_from(
    model: AcceleratedModel, words: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches that `generate` returns hold what was said, and not the tokens computed after the end."""
    monkeypatch.setattr(stop_poller, "poll_lag", lambda device: 5)
    one = {name: value[:1] for name, value in words.items()}
    expected, found = both(model, monkeypatch, **one, max_new_tokens=60, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert isinstance(found.past_key_values, StateCache)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for ours, theirs in zip(
        found.past_key_values.state.views().values(), expected.past_key_values.state.views().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=str)
def test_positions_of_a_decoder_only_model(
    gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With a mask, without one, and with positions that the caller counts otherwise."""
    plain = {"input_ids": gpt2.ids(2, 7)}
    shifted = plain | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    shifted["position_ids"] = torch.arange(200, 207).repeat(2, 1)
    results = []
    for given in (gpt2.inputs(3), plain, shifted):
        expected, found = both(gpt2.model, monkeypatch, **given, max_new_tokens=9, no_repeat_ngram_size=1, **options)
        assert torch.equal(found, expected)
        results.append(found[:, -9:].tolist())
    assert results[1] != results[2]


def test_frequencies_of_samples(gpt2: testing.Subject) -> None:
    """Temperature and top-k: 4,000 draws fall as often on each token as its probability says."""
    draws, warm, kept = 4000, 1.7, 12
    ids = gpt2.ids(1, 7)
    with torch.no_grad():
        logits = gpt2.eager(ids).logits[0, -1] / warm
    logits[logits < logits.topk(kept).values[-1]] = -torch.inf
    expected = logits.softmax(-1)
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": warm, "top_k": kept, "max_new_tokens": 1}
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
def test_what_is_left_to_transformers(
    model: AcceleratedModel,
    words: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    reason: str,
) -> None:
    """A log line says what our loops don't know; the words come all the same."""
    with caplog.at_level(logging.INFO, "accel.decoding"):
        found = model.generate(**words, max_new_tokens=6, **options)
    assert caplog.messages == [f"decoding in transformers: {reason}"]
    assert len(getattr(found, "sequences", found)) == len(WORDS)


def test_a_streamer_is_told_every_token(model: AcceleratedModel, words: dict[str, torch.Tensor]) -> None:
    told: list[torch.Tensor] = []

    class Listening(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: torch.Tensor) -> None:
            told.append(value)

        def end(self) -> None:
            pass

    one = {name: value[:1] for name, value in words.items()}
    found = model.generate(**one, max_new_tokens=9, streamer=Listening())
    assert torch.cat([value.flatten() for value in told]).tolist() == found[0].tolist()
