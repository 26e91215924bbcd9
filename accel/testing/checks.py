"""Checks of the conformance suite. Each raises `AssertionError` where a deployable's results differ from PyTorch's."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import StaticCache
from transformers.modeling_outputs import BaseModelOutput

from accel.models.loading import verification_of
from accel.testing.forward_checks import cache_tensors, forward_caller_cache, forward_kept_logits, forward_logits
from accel.testing.prompt_checks import prompt_cache, prompt_computed_once, prompt_in_chunks
from accel.testing.row_checks import rows_alone, rows_together
from accel.testing.subject import NEW_TOKENS, UNIQUE_TOKENS, Subject

BEAMS = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3}
SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 1.3}


def verified(subject: Subject) -> None:
    """Check that `verify` passed in FP32 and FP16, and that FP32 tokens are identical to PyTorch's."""
    for artifacts, precision in ((subject.artifacts, "float32"), (subject.fp16_artifacts, "float16")):
        verification = verification_of(artifacts["verify"].folder)
        assert verification is not None, "verify wrote no verification result"
        assert verification["passed"], verification["failures"]
        assert verification["precision"] == precision
    assert set(subject.artifacts["verify"].summary["identical"].values()) == {1.0}


def weights_once(subject: Subject) -> None:
    """Check that the merged decoder stores each weight once: its size is that of the larger of its two graphs."""
    for artifacts in (subject.artifacts, subject.fp16_artifacts):
        summary = artifacts["merge"].summary
        tolerance = 4096 + 0.02 * summary["decode_bytes"]  # constants that only one branch has
        prefill_only = summary["prefill_bytes"] - summary["shared_bytes"]  # weights that only prefill has
        assert summary["merged_bytes"] <= summary["decode_bytes"] + prefill_only + tolerance, summary
        assert summary["shared_bytes"] >= 0.95 * summary["decode_bytes"], summary


def mostly_fp16(subject: Subject) -> None:
    """Check that the precision plan keeps less than half of every component's nodes in FP32."""
    for component in subject.architecture.components():
        share = subject.fp16_artifacts["convert"].summary[str(component)]
        assert share["nodes"] > 0.5, (component, share)


def greedy(subject: Subject) -> None:
    """Check greedy search on one input and on a padded batch."""
    subject.assert_same_tokens(**subject.inputs())
    tokens = subject.assert_same_tokens(**subject.inputs(3))
    assert len({tuple(row) for row in tokens.tolist()}) > 1, "all rows of the batch have the same tokens"


def padding(subject: Subject) -> None:
    """Check that a row of a padded batch has the tokens that it has alone."""
    batch = subject.inputs(3)
    if "attention_mask" not in batch:
        return
    # padding ids in the prompt count as generated for `no_repeat_ngram_size`, so forbid them for single rows too
    options = UNIQUE_TOKENS | {"suppress_tokens": [subject.eager.config.pad_token_id]}
    tokens = subject.model.generate(**batch, **options)[:, -NEW_TOKENS:]
    for row in range(3):
        mask = batch["attention_mask"][row].bool()
        single = {name: value[row, mask][None] for name, value in batch.items()}
        alone = subject.model.generate(**single, **options)[0, -NEW_TOKENS:]
        assert torch.equal(alone, tokens[row]), f"row {row}"


def beams(subject: Subject) -> None:
    """Check beam search with several returned sequences and a length penalty, and with early stopping."""
    for rows in (1, 3):
        subject.assert_same_tokens(**subject.inputs(rows) | BEAMS)
    subject.assert_same_tokens(
        distinct=5, **subject.inputs(), num_beams=4, early_stopping=True, min_new_tokens=4, length_penalty=-1.0
    )


def sampling(subject: Subject) -> None:
    """Check sampling from a seed: plain, several sequences with top-p, and beam-sample."""
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"num_return_sequences": 3, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
    )
    for options in variants:
        subject.assert_same_tokens(**subject.inputs(2), **SAMPLE | options)


def without_cache(subject: Subject) -> None:
    """Check `use_cache=False`, where every call of the model gets all tokens."""
    subject.assert_same_tokens(**subject.inputs(2), use_cache=False)


def lengths(subject: Subject) -> None:
    """Check minimum and maximum lengths, with n-grams of three instead of single tokens unique."""
    tokens = subject.assert_same_tokens(
        distinct=1, **subject.inputs(), max_new_tokens=20, min_new_tokens=15, no_repeat_ngram_size=3
    )
    assert tokens.shape[1] >= 15


def end_tokens(subject: Subject) -> None:
    """Check that any of several end-of-sequence ids ends a sequence, while the others continue."""
    inputs = subject.inputs(3)
    unrestricted = subject.assert_same_tokens(**inputs)
    start = unrestricted.shape[1] - NEW_TOKENS
    ends = [int(unrestricted[0, start + 3]), int(unrestricted[1, start + 5])]
    tokens = subject.assert_same_tokens(distinct=3, **inputs, min_new_tokens=None, eos_token_id=ends, pad_token_id=0)
    for row in tokens[:, start:].tolist()[:2]:
        first_end = next(index for index, token in enumerate(row) if token in ends)
        assert first_end <= 5, row
        assert not any(row[first_end + 1 :]), row


def scores(subject: Subject) -> None:
    """Check the scores and logits of every token, and the scores and indices of beams."""
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for options in ({}, {"num_beams": 3}):
        expected, actual = subject.generate_both(**subject.inputs(2), **outputs, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        actual_scores, expected_scores = (*actual.scores, *actual.logits), (*expected.scores, *expected.logits)
        for ours, theirs in zip(actual_scores, expected_scores, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-3)
        if options:
            torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-3, atol=1e-3)
            assert torch.equal(actual.beam_indices, expected.beam_indices)


class OddOnly(LogitsProcessor):
    """Logits processor that forbids even ids."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocabulary] with those of even ids at minus infinity."""
        changed = scores.clone()
        changed[:, ::2] = -torch.inf
        return changed


class StopAfterFiveCalls(StoppingCriteria):
    """Stopping criterion that ends all sequences at its fifth call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for every row whether it ends: [rows]."""
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls >= 5, device=input_ids.device)


def processors(subject: Subject) -> None:
    """Check a logits processor and a stopping criterion of the caller's own."""
    tokens = subject.assert_same_tokens(**subject.inputs(), logits_processor=LogitsProcessorList([OddOnly()]))
    assert all(token % 2 for token in tokens[0, -NEW_TOKENS:].tolist())
    # the criterion counts its calls, so each model gets its own
    results = []
    for model in (subject.eager, subject.model):
        torch.manual_seed(0)
        criteria = StoppingCriteriaList([StopAfterFiveCalls()])
        results.append(model.generate(**subject.inputs(), **UNIQUE_TOKENS, stopping_criteria=criteria))  # type: ignore[operator]
    assert torch.equal(results[0], results[1])
    assert results[0].shape[1] < tokens.shape[1]


class OneLetterTokenizer:
    """Part of a tokenizer that a streamer needs: decodes every id to one letter."""

    def decode(self, ids: Any, **_: Any) -> str:
        """Return the text of `ids`."""
        return "".join(chr(0x4E00 + int(i)) for i in ids)


class RecordingStreamer(TextStreamer):
    """Streamer that keeps the pieces of text it receives."""

    def __init__(self) -> None:
        super().__init__(OneLetterTokenizer())  # type: ignore[arg-type]
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Record a piece of text."""
        self.pieces.append(text)


def streaming(subject: Subject) -> None:
    """Check that a text streamer receives every token, one by one."""
    streamer = RecordingStreamer()
    tokens = subject.model.generate(**subject.inputs(), **UNIQUE_TOKENS, streamer=streamer)
    assert "".join(streamer.pieces).endswith(OneLetterTokenizer().decode(tokens[0, -NEW_TOKENS:]))
    assert len(streamer.pieces) >= NEW_TOKENS


def assisted(subject: Subject) -> None:
    """Check assisted generation: one call checks several ids of a PyTorch drafter; rejected ones leave the cache."""
    drafter = type(subject.eager)(subject.eager.config).eval().to(subject.model.device)
    calls: list[tuple[int, int]] = []  # of `decode`: number of new ids, number of tokens in the cache before
    runtime, decode = subject.model.runtime, subject.model.runtime.decode

    def recording_decode(inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        calls.append((inputs["input_ids"].shape[1], state.length))
        return decode(inputs, state)

    runtime.decode = recording_decode  # type: ignore[method-assign]
    try:
        for noise in (0.0, 0.05):  # a drafter that is always right, and one that is sometimes wrong
            drafter.load_state_dict(subject.eager.state_dict())
            with torch.no_grad():
                for parameter in drafter.parameters():
                    noise_tensor = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                    parameter.add_(noise_tensor.to(parameter.device), alpha=noise)
            subject.assert_same_tokens(**subject.inputs(), assistant_model=drafter)
    finally:
        runtime.decode = decode  # type: ignore[method-assign]
    assert max(new for new, _ in calls) > 1, "no call of decode checked several drafted ids"
    cropped = False
    for (new, past), (_, next_past) in pairwise(calls):
        cropped = cropped or next_past < past + new
    assert cropped, "no rejected id was removed from the cache"


def encoder_outputs(subject: Subject) -> None:
    """Check that `encoder_outputs` of the caller are used unchanged."""
    if not subject.has_encoder:
        return
    inputs = subject.inputs(2)
    with torch.no_grad():
        hidden = subject.eager.get_encoder()(**inputs).last_hidden_state
    mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    for options in ({}, {"num_beams": 3}):
        results = []
        for model in (subject.eager, subject.model):
            outputs = BaseModelOutput(last_hidden_state=hidden.clone())
            results.append(model.generate(encoder_outputs=outputs, **mask, **UNIQUE_TOKENS, **options))  # type: ignore[operator]
        assert torch.equal(results[0], results[1])


def prompts(subject: Subject) -> None:
    """Check prefills of several tokens: a prompt for the decoder of an encoder-decoder, or a long input."""
    if not subject.has_encoder:
        subject.assert_same_tokens(**subject.inputs(2, 40))
        return
    prompt = subject.ids(2, 4)
    tokens = subject.assert_same_tokens(**subject.inputs(2), decoder_input_ids=prompt)
    if tokens.shape[1] > NEW_TOKENS:  # speech models don't return the prompt
        assert torch.equal(tokens[:, -NEW_TOKENS - 4 : -NEW_TOKENS], prompt)


def second_turn(subject: Subject) -> None:
    """Check a second call of `generate` that continues the first, with the first one's caches and without."""
    inputs = subject.inputs() if subject.has_encoder else {"input_ids": subject.ids(1, 7)}
    results = []
    for model in (subject.eager, subject.model):
        first = model.generate(**inputs, **UNIQUE_TOKENS, return_dict_in_generate=True)  # type: ignore[operator]
        ids = torch.cat([first.sequences, subject.ids(1, 3, seed=8)], dim=1)
        if subject.has_encoder:
            second_inputs = {**inputs, "decoder_input_ids": ids}
        else:
            second_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = UNIQUE_TOKENS | {"no_repeat_ngram_size": 2}
        for cache in ({"past_key_values": first.past_key_values}, {}):
            results.append(model.generate(**second_inputs, **options, **cache))  # type: ignore[operator]
    for expected, actual in zip(results[:2], results[2:], strict=True):
        assert torch.equal(actual, expected), [result.tolist() for result in results]


def static_caches(subject: Subject) -> None:
    """Check accel's static caches across buckets: tokens, with padding and with beams, and the caches themselves.

    A prompt of one token starts with a static decode step instead of a prefill, as encoder-decoders always do.
    """
    if subject.static is None:
        return
    subject = replace(subject, model=subject.static)
    subject.assert_same_tokens(**subject.inputs(3), max_new_tokens=20, distinct=18)
    subject.assert_same_tokens(**subject.inputs(2) | BEAMS)
    if not subject.has_encoder:
        subject.assert_same_tokens(**subject.inputs(3, length=1))
    expected, actual = subject.generate_both(**subject.inputs(), max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected.sequences)
    tensors, expected_tensors = cache_tensors(actual.past_key_values), cache_tensors(expected.past_key_values)
    for tensor, expected_tensor in zip(tensors, expected_tensors, strict=True):  # [B, H, S, D]
        # a sliding window of PyTorch's drops old tokens, while our caches keep and mask them
        length = expected_tensor.shape[2]
        torch.testing.assert_close(tensor[:, :, -length:], expected_tensor, rtol=1e-3, atol=1e-4)


def transformers_static_cache(subject: Subject) -> None:
    """Check transformers' `StaticCache`, requested by name or passed in: padding stays masked."""
    inputs, results = subject.inputs(3), []
    try:
        with torch.inference_mode():
            subject.eager.generate(**inputs, **UNIQUE_TOKENS, cache_implementation="static")  # type: ignore[operator]
    except ValueError:
        return  # PyTorch's model doesn't support it, as Falcon with ALiBi
    for options in ({}, {"num_beams": 3}):
        subject.assert_same_tokens(**inputs, cache_implementation="static", **options)
    if subject.has_encoder:
        return
    for model in (subject.eager, subject.model):
        cache = StaticCache(subject.eager.config, max_cache_len=inputs["input_ids"].shape[1] + NEW_TOKENS)
        with torch.inference_mode():
            results.append(model.generate(**inputs, **UNIQUE_TOKENS, past_key_values=cache))  # type: ignore[operator]
    assert torch.equal(results[0], results[1])


Check = Callable[[Subject], None]
"""Function that raises `AssertionError` where a deployable's results differ from PyTorch's."""

CHECKS: tuple[Check, ...] = (
    verified,
    weights_once,
    mostly_fp16,
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
    transformers_static_cache,
    forward_logits,
    forward_kept_logits,
    forward_caller_cache,
    prompt_cache,
    prompt_computed_once,
    prompt_in_chunks,
    rows_alone,
    rows_together,
)


def name(check: Check) -> str:
    """Return the name of a check, for pytest's `ids`."""
    return check.__name__
