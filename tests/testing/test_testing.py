"""Checks of the conformance suite fail when the behaviour that they check is broken."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from accel import testing
from accel.runtime.decode_buffers import DecodeBuffers
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.static_cache import StaticCacheState
from accel.testing import checks

pytestmark = pytest.mark.xdist_group("gpt2")  # the family's own tests export the same model


Break = Callable[[testing.Subject, pytest.MonkeyPatch], None]


def changed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Break:
    """Change the inputs of every call of the decoder."""

    def apply(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
        runtime = subject.model.runtime
        decode, prefill = runtime.decode, runtime.prefill
        patch.setattr(runtime, "decode", lambda inputs, state: decode(change(dict(inputs)), state))
        patch.setattr(runtime, "prefill", lambda inputs: prefill(change(dict(inputs))))

    return apply


def shifted_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shift all positions by one."""
    return inputs | {"position_ids": inputs["position_ids"] + 1}


def unmasked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unmask padding."""
    return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}


def without_dynamic(method: str) -> Break:
    """Make a method of the dynamic caches do nothing."""
    return lambda subject, patch: patch.setattr(DynamicCacheState, method, lambda self, argument: None)


def without_static(name: str) -> Break:
    """Make a method of the static caches, or of their decode buffers, do nothing."""
    owner = StaticCacheState if hasattr(StaticCacheState, name) else DecodeBuffers
    return lambda subject, patch: patch.setattr(owner, name, lambda self, *arguments: None)


def displaced_copies(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Copy caches with every token one position too late."""
    copy = DynamicCacheState.copy

    def displaced_copy(state: DynamicCacheState) -> DynamicCacheState:
        copied = copy(state)
        copied.self_caches = {name: cache.roll(1, copied.axes[name]) for name, cache in copied.self_caches.items()}
        return copied

    patch.setattr(DynamicCacheState, "copy", displaced_copy)


def computed_for_each_beam(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Compute the copies of a prompt one by one."""
    patch.setattr(type(subject.model), "_copies_of_prompts", lambda self, *arguments: 1)


def displaced(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Write new cache entries one position too early."""
    write_inputs = DecodeBuffers.write_inputs
    patch.setattr(DecodeBuffers, "write_inputs", lambda self, inputs, length: write_inputs(self, inputs, length - 1))


def larger_logits(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Make logits one percent too large: the same tokens, other scores."""
    decode = subject.model.runtime.decode
    patch.setattr(subject.model.runtime, "decode", lambda inputs, state: 1.01 * decode(inputs, state))


def larger_prefill_logits(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Make the logits of prefill ten percent too large."""
    prefill = subject.model.runtime.prefill

    def changed_prefill(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        logits, state = prefill(inputs)
        return 1.1 * logits, state

    patch.setattr(subject.model.runtime, "prefill", changed_prefill)


def misaligned(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Return the logits of the first tokens in place of the last."""
    prefill = subject.model.runtime.prefill

    def changed_prefill(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        logits, state = prefill({**inputs, "num_logits_to_keep": torch.tensor(0)})
        return logits[:, : len(inputs["logits_to_keep"])], state

    patch.setattr(subject.model.runtime, "prefill", changed_prefill)


def failed(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Replace the verification result by a failed one."""
    patch.setattr(checks, "verification_of", lambda folder: {"passed": False, "failures": ["logits"]})


def stored_twice(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Report twice the bytes, as if every weight were stored twice."""
    summary: Mapping[str, Any] = subject.artifacts["merge"].summary
    patch.setitem(summary, "merged_bytes", 2 * summary["decode_bytes"])  # type: ignore[arg-type]


def mostly_fp32(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Report most nodes of a graph in FP32."""
    patch.setitem(subject.fp16_artifacts["convert"].summary["decode"], "nodes", 0.4)


def without_streamer(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Let `generate` ignore its streamer."""
    generate = subject.model.generate
    patch.setattr(subject.model, "generate", lambda streamer=None, **options: generate(**options))


@pytest.mark.parametrize(
    ("check", "break_subject"),
    [
        (checks.verified, failed),
        (checks.weights_once, stored_twice),
        (checks.mostly_fp16, mostly_fp32),
        (checks.streaming, without_streamer),
        (checks.greedy, changed(shifted_positions)),
        (checks.greedy, changed(unmasked)),
        (checks.padding, changed(unmasked)),
        (checks.beams, without_dynamic("reorder")),
        (checks.sampling, changed(shifted_positions)),
        (checks.without_cache, changed(shifted_positions)),
        (checks.lengths, changed(shifted_positions)),
        (checks.end_tokens, changed(shifted_positions)),
        (checks.scores, larger_logits),
        (checks.processors, changed(shifted_positions)),
        (checks.assisted, without_dynamic("crop")),
        (checks.prompts, changed(shifted_positions)),
        (checks.second_turn, changed(shifted_positions)),
        (checks.static_caches, without_static("reorder")),
        (checks.static_caches, without_static("write")),
        (checks.static_caches, displaced),
        (checks.forward_logits, larger_prefill_logits),
        (checks.forward_logits, changed(shifted_positions)),
        (checks.forward_kept_logits, misaligned),
        (checks.forward_caller_cache, changed(shifted_positions)),
        (checks.prompt_cache, displaced_copies),
        (checks.prompt_computed_once, computed_for_each_beam),
        (checks.prompt_in_chunks, changed(shifted_positions)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_fails_on_broken_behaviour(
    gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, check: testing.Check, break_subject: Break
) -> None:
    check(gpt2)
    break_subject(gpt2, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):  # ONNX Runtime may refuse inconsistent shapes
        check(gpt2)
