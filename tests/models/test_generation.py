"""Every decoding method of transformers gives PyTorch's tokens, over two runtimes that share no code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from accel.adapters import registry
from accel.cli.compose import compose
from accel.models.factory import model_over
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from tests.conftest import overrides_for
from tests.random_t5 import random_t5
from tests.runtime.fake import FakeRuntime

UNIQUE = {"max_new_tokens": 20, "no_repeat_ngram_size": 1}  # random weights would repeat one token


@pytest.fixture(scope="module", params=["onnx", "fake"])
def model(request: pytest.FixtureRequest, tiny: Path, eager: T5ForConditionalGeneration) -> Iterator[AcceleratedModel]:
    """A model over ONNX Runtime with dynamic caches, and one over `FakeRuntime`."""
    if request.param == "onnx":
        with load(request.getfixturevalue("deployable"), runtime="cpu") as opened:
            yield opened
    else:
        architecture = registry.build(compose(overrides_for(tiny, Path("unused"))).architecture)
        yield model_over(
            FakeRuntime(architecture, eager), eager.config, GenerationConfig.from_model_config(eager.config)
        )


def batch(rows: int = 1, length: int = 9, padded: bool = False) -> dict[str, Tensor]:
    """Return random ids and their mask, [rows, length]; with `padded`, later rows are shorter."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(1, rows if padded else 0):
        mask[row, length - 3 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same_tokens(
    model: AcceleratedModel, eager: T5ForConditionalGeneration, distinct: int = 15, **options: Any
) -> Tensor:
    """Return the tokens of both; they must be equal, with at least `distinct` different ids in the first sequence."""
    torch.manual_seed(0)
    expected = eager.generate(**UNIQUE | options)
    torch.manual_seed(0)
    found = model.generate(**UNIQUE | options)
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) >= distinct
    return found


BEAMS = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3}
SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 1.3}


@pytest.mark.parametrize("rows", [1, 3], ids=["single", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4, "bad_words_ids": [[14], [55, 79]]},
        BEAMS,
        {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0},
        SAMPLE,
        SAMPLE | {"num_return_sequences": 4, "top_p": 0.9},
        SAMPLE | {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        BEAMS | {"use_cache": False},
        {"min_new_tokens": 20},
    ],
    ids=[
        "greedy",
        "penalty",
        "beams",
        "early stopping",
        "sampling",
        "several samples",
        "beam sample",
        "no cache",
        "beams, no cache",
        "forced length",
    ],
)
def test_tokens_are_pytorchs(
    model: AcceleratedModel, eager: T5ForConditionalGeneration, rows: int, options: dict[str, Any]
) -> None:
    """Each decoding method agrees, on one input and on a padded batch of three."""
    found = assert_same_tokens(model, eager, **batch(rows, padded=True), **options)
    assert found.shape[0] == rows * options.get("num_return_sequences", 1)
    if rows > 1:
        assert len({tuple(sequence) for sequence in found.tolist()}) > 1


def test_padding_changes_nothing(model: AcceleratedModel) -> None:
    """A row of a padded batch gets the tokens it gets alone."""
    inputs = batch(3, padded=True)
    found = model.generate(**inputs, **UNIQUE)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        alone = model.generate(
            input_ids=inputs["input_ids"][row : row + 1, :length],
            attention_mask=inputs["attention_mask"][row : row + 1, :length],
            **UNIQUE,
        )[0]
        assert torch.equal(found[row, : len(alone)], alone)


def test_without_a_mask(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Ids alone are enough, as for PyTorch."""
    assert_same_tokens(model, eager, input_ids=batch(2)["input_ids"])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, SAMPLE], ids=["greedy", "beams", "sampling"])
def test_scores(model: AcceleratedModel, eager: T5ForConditionalGeneration, options: dict[str, Any]) -> None:
    """`output_scores` and `output_logits` give PyTorch's numbers, token by token."""
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    results = []
    for subject in (eager, model):
        torch.manual_seed(0)
        results.append(subject.generate(**batch(2), **UNIQUE, **outputs, **options))
    expected, found = results
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores) > 10
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if options.get("num_beams"):
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.beam_indices, expected.beam_indices)
    assert float(found.logits[3].std()) > 0.01


class OddOnly(LogitsProcessor):
    """Logits processor that forbids even ids, except 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 2::2] = -torch.inf
        return scores


class SumReached(StoppingCriteria):
    """Stopping criterion on the sum of the ids, which depends on the generated tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return input_ids.sum(dim=1) > 500


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_processor(model: AcceleratedModel, eager: T5ForConditionalGeneration, beams: int) -> None:
    """A custom logits processor is applied."""
    found = assert_same_tokens(
        model, eager, num_beams=beams, logits_processor=LogitsProcessorList([OddOnly()]), **batch(2)
    )
    assert all(token % 2 or token == 0 for token in found.flatten().tolist())


def test_stopping_criteria(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """A custom stopping criterion ends each sequence where it does for PyTorch."""
    criteria = StoppingCriteriaList([SumReached()])
    found = assert_same_tokens(model, eager, distinct=5, stopping_criteria=criteria, **batch(2))
    assert found.shape[1] < model.generate(**batch(2), **UNIQUE).shape[1]


class CollectingStreamer(BaseStreamer):
    """Streamer that keeps every token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.calls = 0
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.calls += 1
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(model: AcceleratedModel) -> None:
    """Tokens arrive one by one, in order, followed by a call of `end`."""
    streamer = CollectingStreamer()
    found = model.generate(**batch(), **UNIQUE, streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.calls == len(streamer.tokens) > 10
    assert streamer.ended


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_outputs_from_the_caller(
    model: AcceleratedModel, eager: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    """Hidden states that the caller passes are used, and the encoder does not run."""
    inputs = batch(3, padded=True)
    with torch.no_grad():
        hidden = eager.get_encoder()(**inputs).last_hidden_state
    monkeypatch.setattr(model.runtime, "encode", lambda inputs: pytest.fail("the encoder ran"))
    options = {"attention_mask": inputs["attention_mask"], "num_beams": beams}
    outputs = [
        subject.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden.clone()), **options, **UNIQUE)
        for subject in (eager, model)
    ]
    assert torch.equal(*outputs)
    assert len(set(outputs[0][0].tolist())) >= 15


@pytest.mark.parametrize("beams", [1, 3])
def test_decoder_prompt(model: AcceleratedModel, eager: T5ForConditionalGeneration, beams: int) -> None:
    """A prompt of several decoder tokens is prefilled at once, and the output begins with it."""
    prompt = torch.tensor([[0, 17, 33, 5], [0, 8, 64, 101]])
    found = assert_same_tokens(model, eager, decoder_input_ids=prompt, num_beams=beams, **batch(2))
    assert torch.equal(found[:, :4], prompt)


def test_transformers_prepares_caches_only_where_needed(
    model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache preparation runs only for methods that use a cache before the first call of the model."""
    real = GenerationMixin._prepare_cache_for_generation
    modes = []

    def recorded(self: Any, *arguments: Any) -> Any:
        modes.append(arguments[2].value)
        return real(self, *arguments)

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", recorded)
    for options in ({}, SAMPLE, {"num_beams": 3}, SAMPLE | {"num_beams": 2}, {"use_cache": False}):
        model.generate(**batch(), max_new_tokens=3, **options)
    assert not modes
    model.generate(**batch(), max_new_tokens=3, cache_implementation="dynamic")
    model.generate(**batch(), max_new_tokens=3, prompt_lookup_num_tokens=2)
    assert modes == ["greedy_search", "assisted_generation"]


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sampling"])
def test_assisted(model: AcceleratedModel, eager: T5ForConditionalGeneration, options: dict[str, Any]) -> None:
    """A PyTorch model drafts, decode steps check several ids, and rejected ones are cropped from the cache."""
    calls: list[tuple[int, int]] = []  # ids and past tokens of each decode step
    real = model.runtime.decode
    drafter = random_t5(
        seed=0
    )  # the model itself, so that drafts are accepted, with some noise, so that some are rejected
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def decode(inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        calls.append((inputs["input_ids"].shape[1], state.length))
        return real(inputs, state)

    model.runtime.decode = decode  # type: ignore[method-assign]
    try:
        assert_same_tokens(model, eager, assistant_model=drafter, **batch(), **options)
    finally:
        model.runtime.decode = real  # type: ignore[method-assign]
    assert max(count for count, _ in calls) > 1, "no decode step checked several drafted ids"
    if not options:
        lengths = [length for _, length in calls]
        assert any(after < before + count for (count, before), after in zip(calls, lengths[1:], strict=False)), (
            "nothing was ever cropped"
        )


def test_prompt_lookup(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Prompt lookup, which drafts from the text so far, gives the same tokens."""
    assert_same_tokens(
        model, eager, 1, prompt_lookup_num_tokens=3, no_repeat_ngram_size=0, repetition_penalty=1.2, **batch()
    )


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_attentions_and_hidden_states_are_refused(model: AcceleratedModel, option: str) -> None:
    """Outputs that the graphs don't compute are refused, not silently left out."""
    with pytest.raises(ValueError, match=option):
        model.generate(**batch(), **UNIQUE, return_dict_in_generate=True, **{option: True})


def test_decoder_attention_mask_is_refused(model: AcceleratedModel) -> None:
    """A mask that hides decoder tokens is refused, not silently ignored; a mask of ones is accepted."""
    inputs = batch(2) | {"decoder_input_ids": torch.tensor([[0, 5], [0, 7]])}
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        model(**inputs, decoder_attention_mask=torch.tensor([[0, 1], [1, 1]]))
    unmasked = model(**inputs, decoder_attention_mask=torch.ones(2, 2, dtype=torch.int64)).logits
    assert torch.equal(unmasked, model(**inputs).logits)


def test_forward_names_missing_inputs(model: AcceleratedModel) -> None:
    """A direct call of the model without an input names that input."""
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(input_ids=torch.tensor([[5]]))
    with pytest.raises(ValueError, match="encoder_outputs"):
        model(decoder_input_ids=torch.tensor([[0]]))


def test_forward(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Logits of a direct call, and of a second one with the first one's caches, are PyTorch's."""
    inputs = batch(2)
    start, next_ids = torch.tensor([[0], [0]]), torch.tensor([[9], [11]])
    results = []
    for subject in (eager, model):
        with torch.no_grad():
            first = subject(**inputs, decoder_input_ids=start, use_cache=True)
            second = subject(
                encoder_outputs=BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=next_ids,
                past_key_values=first.past_key_values,
                use_cache=True,
            )
        results.append((first.logits, second.logits))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
