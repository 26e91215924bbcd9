"""One function a check: what PyTorch does, the deployable does. Each raises `AssertionError` where they part ways."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from accel.models.generation import StateCache
from accel.models.loading import verification_of
from accel.testing.subject import TOKENS, UNIQUE, Subject

BEAMS = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3}
SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 1.3}


def verified(subject: Subject) -> None:
    """Outputs at unseen shapes, logits along a path and tokens are PyTorch's; in FP16, outputs within rounding."""
    for made, precision in ((subject.artifacts, "float32"), (subject.half, "float16")):
        verification = verification_of(made["verify"].folder)
        assert verification is not None, "verify wrote no verdict"
        assert verification["passed"], verification["failures"]
        assert verification["precision"] == precision
    assert set(subject.artifacts["verify"].summary["identical"].values()) == {1.0}


def weights_once(subject: Subject) -> None:
    """The merged decoder holds each weight once: it is as large as the larger of its two graphs."""
    for made in (subject.artifacts, subject.half):
        summary = made["merge"].summary
        small = 4096 + 0.02 * summary["decode_bytes"]  # constants that belong to one branch
        own = summary["prefill_bytes"] - summary["shared_bytes"]  # what prefill alone computes with
        assert summary["merged_bytes"] <= summary["decode_bytes"] + own + small, summary
        assert summary["shared_bytes"] >= 0.95 * summary["decode_bytes"], summary


def mostly_half(subject: Subject) -> None:
    """The audit leaves most of the graph to FP16."""
    for component in subject.architecture.components():
        share = subject.half["convert"].summary[str(component)]
        assert share["nodes"] > 0.5, (component, share)


def greedy(subject: Subject) -> None:
    """One input, and a padded batch."""
    subject.same(**subject.inputs())
    found = subject.same(**subject.inputs(3))
    assert len({tuple(row) for row in found.tolist()}) > 1, "all rows of the batch say the same"


def padding(subject: Subject) -> None:
    """A row of a padded batch says what it says alone."""
    together = subject.inputs(3)
    if "attention_mask" not in together:
        return
    options = UNIQUE | {"suppress_tokens": [subject.eager.config.pad_token_id]}  # else it counts as said where it pads
    found = subject.model.generate(**together, **options)[:, -TOKENS:]
    for row in range(3):
        kept = together["attention_mask"][row].bool()
        alone = {name: value[row, kept][None] for name, value in together.items()}
        assert torch.equal(subject.model.generate(**alone, **options)[0, -TOKENS:], found[row]), f"row {row}"


def beams(subject: Subject) -> None:
    """Four beams, several of them returned, with a length penalty; and beams that stop early."""
    for rows in (1, 3):
        subject.same(**subject.inputs(rows) | BEAMS)
    subject.same(
        distinct=5, **subject.inputs(), num_beams=4, early_stopping=True, min_new_tokens=4, length_penalty=-1.0
    )


def sampling(subject: Subject) -> None:
    """From a seed: plain, several samples of a top-p set, and beam-sample."""
    several: tuple[dict[str, Any], ...] = (
        {},
        {"num_return_sequences": 3, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
    )
    for options in several:
        subject.same(**subject.inputs(2), **SAMPLE | options)


def without_cache(subject: Subject) -> None:
    """Every call sees all tokens."""
    subject.same(**subject.inputs(2), use_cache=False)


def lengths(subject: Subject) -> None:
    """A least and a largest number of tokens, and repetition allowed up to three in a row."""
    found = subject.same(distinct=1, **subject.inputs(), max_new_tokens=20, min_new_tokens=15, no_repeat_ngram_size=3)
    assert found.shape[1] >= 15


def end_tokens(subject: Subject) -> None:
    """Any of several end-of-sequence ids ends a sequence, and the others go on."""
    given = subject.inputs(3)
    said = subject.same(**given)
    begin = said.shape[1] - TOKENS
    ends = [int(said[0, begin + 3]), int(said[1, begin + 5])]
    found = subject.same(distinct=3, **given, min_new_tokens=None, eos_token_id=ends, pad_token_id=0)[:, begin:]
    for row in found.tolist()[:2]:
        first = next(place for place, token in enumerate(row) if token in ends)
        assert first <= 5, row
        assert not any(row[first + 1 :]), row


def scores(subject: Subject) -> None:
    """Scores and logits of every token, and of beams, as PyTorch gives them."""
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for options in ({}, {"num_beams": 3}):
        expected, found = subject.both(**subject.inputs(2), **asked, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip((*found.scores, *found.logits), (*expected.scores, *expected.logits), strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-3)
        if options:
            torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-3, atol=1e-3)
            assert torch.equal(found.beam_indices, expected.beam_indices)


class OddOnly(LogitsProcessor):
    """Forbids even ids."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed = scores.clone()
        changed[:, ::2] = -torch.inf
        return changed


class FiveMore(StoppingCriteria):
    """Stops after five calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls >= 5, device=input_ids.device)


def processors(subject: Subject) -> None:
    """A logits processor and a stopping criterion of the caller's own."""
    found = subject.same(**subject.inputs(), logits_processor=LogitsProcessorList([OddOnly()]))
    assert all(token % 2 for token in found[0, -TOKENS:].tolist())
    # a criterion counts its calls, so each model gets its own
    results = []
    for model in (subject.eager, subject.model):
        torch.manual_seed(0)
        criteria = StoppingCriteriaList([FiveMore()])
        results.append(model.generate(**subject.inputs(), **UNIQUE, stopping_criteria=criteria))  # type: ignore[operator]
    assert torch.equal(results[0], results[1])
    assert results[0].shape[1] < found.shape[1]


class Letters:
    """As much of a tokenizer as a streamer needs: one letter an id."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


class Gathering(TextStreamer):
    """Keeps the text it is given, piece by piece."""

    def __init__(self) -> None:
        super().__init__(Letters())  # type: ignore[arg-type]
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


def streaming(subject: Subject) -> None:
    """A text streamer gets every token, one by one."""
    streamer = Gathering()
    found = subject.model.generate(**subject.inputs(), **UNIQUE, streamer=streamer)
    assert "".join(streamer.pieces).endswith(Letters().decode(found[0, -TOKENS:]))
    assert len(streamer.pieces) >= TOKENS


def assisted(subject: Subject) -> None:
    """A PyTorch model drafts, several ids a step are checked, wrong ones leave the cache."""
    drafter = type(subject.eager)(subject.eager.config).eval().to(subject.model.device)
    calls: list[tuple[int, int]] = []  # ids of a step, tokens seen before it
    runtime, decode = subject.model.runtime, subject.model.runtime.decode

    def noted(inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        calls.append((inputs["input_ids"].shape[1], state.length))
        return decode(inputs, state)

    runtime.decode = noted  # type: ignore[method-assign]
    try:
        for noise in (0.0, 0.05):  # a drafter that is always right, and one that is not
            drafter.load_state_dict(subject.eager.state_dict())
            with torch.no_grad():
                for parameter in drafter.parameters():
                    other = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                    parameter.add_(other.to(parameter.device), alpha=noise)
            subject.same(**subject.inputs(), assistant_model=drafter)
    finally:
        runtime.decode = decode  # type: ignore[method-assign]
    assert max(new for new, _ in calls) > 1, "no step checked several drafted ids"
    ends = [seen + new for new, seen in calls]
    assert any(seen < end for (_, seen), end in zip(calls[1:], ends, strict=False)), "nothing ever left the cache"


def encoder_outputs(subject: Subject) -> None:
    """Hidden states that the caller computed are taken as they are."""
    if not subject.encodes:
        return
    given = subject.inputs(2)
    with torch.no_grad():
        hidden = subject.eager.get_encoder()(**given).last_hidden_state
    mask = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    for options in ({}, {"num_beams": 3}):
        results = [
            model.generate(  # type: ignore[operator]
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden.clone()), **mask, **UNIQUE, **options
            )
            for model in (subject.eager, subject.model)
        ]
        assert torch.equal(*results)


def prompts(subject: Subject) -> None:
    """Several tokens at once: a prompt for the decoder, or a long input."""
    if not subject.encodes:
        subject.same(**subject.inputs(2, 40))
        return
    prompt = subject.ids(2, 4)
    found = subject.same(**subject.inputs(2), decoder_input_ids=prompt)
    if found.shape[1] > TOKENS:  # speech leaves the prompt out of what it returns
        assert torch.equal(found[:, -TOKENS - 4 : -TOKENS], prompt)


def second_turn(subject: Subject) -> None:
    """A second call goes on from the first one's caches, or sees everything anew."""
    given = subject.inputs() if subject.encodes else {"input_ids": subject.ids(1, 7)}
    results = []
    for model in (subject.eager, subject.model):
        first = model.generate(**given, **UNIQUE, return_dict_in_generate=True)  # type: ignore[operator]
        more = torch.cat([first.sequences, subject.ids(1, 3, seed=8)], dim=1)
        if subject.encodes:
            again = {**given, "decoder_input_ids": more}
        else:
            again = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        options = UNIQUE | {"no_repeat_ngram_size": 2}
        for cached in ({"past_key_values": first.past_key_values}, {}):
            results.append(model.generate(**again, **options, **cached))  # type: ignore[operator]
    for expected, found in zip(results[:2], results[2:], strict=True):
        assert torch.equal(found, expected), [result.tolist() for result in results]


def static_caches(subject: Subject) -> None:
    """Caches of a fixed length, from bucket to bucket: the same tokens, padded and with beams, and the same caches.

    A prompt of one token begins with a step, as an encoder-decoder always does.
    """
    if subject.static is None:
        return
    subject = replace(subject, model=subject.static)
    subject.same(**subject.inputs(3), max_new_tokens=20, distinct=18)
    subject.same(**subject.inputs(2) | BEAMS)
    if not subject.encodes:
        subject.same(**subject.inputs(3, length=1))
    expected, found = subject.both(**subject.inputs(), max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    for tensor, right in zip(_tensors(found.past_key_values), _tensors(expected.past_key_values), strict=True):
        kept = right.shape[2]  # a sliding window forgets; ours masks
        torch.testing.assert_close(tensor[:, :, -kept:], right, rtol=1e-3, atol=1e-4)


def fixed_caches(subject: Subject) -> None:
    """What transformers calls a static cache, asked for by name or passed in: padding stays masked."""
    given, results = subject.inputs(3), []
    try:
        with torch.inference_mode():
            subject.eager.generate(**given, **UNIQUE, cache_implementation="static")  # type: ignore[operator]
    except ValueError:
        return  # transformers' own model can't use one, as Falcon with ALiBi
    for options in ({}, {"num_beams": 3}):
        subject.same(**given, cache_implementation="static", **options)
    if subject.encodes:
        return
    for model in (subject.eager, subject.model):
        cache = StaticCache(subject.eager.config, max_cache_len=given["input_ids"].shape[1] + TOKENS)
        with torch.inference_mode():
            results.append(model.generate(**given, **UNIQUE, past_key_values=cache))  # type: ignore[operator]
    assert torch.equal(*results)


def _tensors(cache: Any) -> list[Tensor]:
    """Keys and values of all layers, the decoder's own first."""
    if isinstance(cache, StateCache):
        return list(cache.state.views().values())
    both = isinstance(cache, EncoderDecoderCache)
    caches = (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,)
    layers = [layer for one in caches for layer in one.layers if layer.keys is not None]  # T5 counts its encoder's
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


Check = Callable[[Subject], None]
CHECKS: tuple[Check, ...] = (
    verified,
    weights_once,
    mostly_half,
    greedy,
    padding,
    beams,
    sampling,
    without_cache,
    lengths,
    end_tokens,
    scores,
    processors,
    streaming,
    assisted,
    encoder_outputs,
    prompts,
    second_turn,
    static_caches,
    fixed_caches,
)


def name(check: Check) -> str:
    """A check's name, for pytest's `ids`."""
    return check.__name__
