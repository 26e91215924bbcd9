"""Checks of prompts: kept for many generations, computed once for all beams and samples, and computed in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from accel.models.decoding.loops import PREPARE_INPUTS
from accel.models.generation import AcceleratedModel
from accel.models.rope import angles_depend_on_length
from accel.testing.subject import UNIQUE_TOKENS, Subject

PREFIX = 7  # tokens that all prompts begin with
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2})


def prompt_cache(subject: Subject) -> None:
    """Check that prompts over a cache of their first tokens give PyTorch's tokens, again and again."""
    if subject.has_encoder:
        return
    prefix = subject.ids(1, PREFIX)
    prompts = torch.cat([prefix.expand(2, -1), subject.ids(2, 4, seed=6)], dim=1)  # [2, 11]
    mask = torch.ones_like(prompts)
    mask[1, PREFIX : PREFIX + 2] = 0  # padding behind the shared tokens
    for model in cast(Any, _models(subject)):
        cache = model.cache_prompt(prefix)
        whole = model.cache_prompt(prompts[:1])
        with _counted_prefills(model) as rows:
            for options in (*OPTIONS, OPTIONS[0]):
                inputs = {"input_ids": prompts, "attention_mask": mask, **options}
                _assert_same_tokens(subject, model, inputs, {"past_key_values": cache})
            # a prompt that differs from the cache after some tokens, and one that is all in it
            for each in (prompts[1:], prompts[:1]):
                _assert_same_tokens(subject, model, {"input_ids": each}, {"past_key_values": whole})
            assert rows == [], "a prompt was computed from its first token"
        filled = DynamicCache()
        model(input_ids=prefix, past_key_values=filled)
        for _ in range(2):  # as transformers' documentation reuses a cache
            _assert_same_tokens(subject, model, {"input_ids": prompts[:1]}, {"past_key_values": deepcopy(filled)})
        assert filled.get_seq_length() == PREFIX


def prompt_computed_once(subject: Subject) -> None:
    """Check that the copies of a prompt for beams and samples are computed as one row, where accel's loops run."""
    own_inputs = getattr(type(subject.model), PREPARE_INPUTS) is not getattr(GenerationMixin, PREPARE_INPUTS)
    if subject.has_encoder or own_inputs:
        return
    inputs = subject.inputs(3)
    for options in OPTIONS:
        with _counted_prefills(subject.model) as rows:
            subject.assert_same_tokens(**inputs, **options)
        assert rows == [3], rows


def prompt_in_chunks(subject: Subject) -> None:
    """Check tokens and logits of prompts that are computed in chunks, also behind a cache.

    Padding reaches across the end of the first chunk.
    """
    runtime: Any = subject.model.runtime
    if subject.has_encoder or angles_depend_on_length(subject.eager.config):
        return
    inputs, eager = subject.inputs(3, length=11), cast(Any, subject.eager)
    runtime.prefill_chunk = 4
    try:
        for options in OPTIONS:
            subject.assert_same_tokens(**inputs, **options)
        with torch.inference_mode():
            for keep in (0, 1, 6):
                expected = eager(**inputs, logits_to_keep=keep).logits
                actual = subject.model(**inputs, logits_to_keep=keep).logits
                assert actual.shape == expected.shape
                shown = inputs["attention_mask"][:, -actual.shape[1] :].bool()
                torch.testing.assert_close(actual[shown], expected[shown], rtol=2e-3, atol=2e-3)
        ids = subject.ids(2, 11)
        ids[1, :2] = ids[0, :2]
        cache = cast(Any, subject.model).cache_prompt(ids[:1, :2])
        for rows in (1, 2):
            _assert_same_tokens(subject, subject.model, {"input_ids": ids[:rows]}, {"past_key_values": cache})
    finally:
        runtime.prefill_chunk = 0


def _models(subject: Subject) -> list[AcceleratedModel]:
    """Return the deployable with dynamic and, where there is one, with static caches."""
    return [subject.model] if subject.static is None else [subject.model, subject.static]


def _assert_same_tokens(
    subject: Subject, model: AcceleratedModel, inputs: dict[str, Any], cached: dict[str, Any]
) -> Tensor:
    """Require PyTorch's tokens, without a cache, from the deployable with one; from the same seed."""
    results = []
    eager: Any = subject.eager
    for generate, options in ((eager.generate, {}), (model.generate, cached)):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(generate(**UNIQUE_TOKENS | inputs | options))
    assert torch.equal(results[0], results[1]), [result.tolist() for result in results]
    return results[1]  # type: ignore[no-any-return]


@contextmanager
def _counted_prefills(model: AcceleratedModel) -> Iterator[list[int]]:
    """Collect the number of rows of each prefill."""
    rows: list[int] = []
    runtime: Any = model.runtime
    prefill = runtime.prefill

    def counted(inputs: dict[str, Tensor]) -> Any:
        rows.append(len(inputs["input_ids"]))
        return prefill(inputs)

    runtime.prefill = counted
    try:
        yield rows
    finally:
        del runtime.prefill
