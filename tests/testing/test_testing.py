"""The conformance suite notices: 17 of its 18 checks, each failing once what it guards is broken."""

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
    """Every call of the decoder with other inputs."""

    def apply(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
        runtime = subject.model.runtime
        decode, prefill = runtime.decode, runtime.prefill
        patch.setattr(runtime, "decode", lambda inputs, state: decode(change(dict(inputs)), state))
        patch.setattr(runtime, "prefill", lambda inputs: prefill(change(dict(inputs))))

    return apply


def later(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"position_ids": inputs["position_ids"] + 1}


def unmasked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}


def forgetful(method: str) -> Break:
    """The caches are left as they were where they should change."""
    return lambda subject, patch: patch.setattr(DynamicCacheState, method, lambda self, argument: None)


def in_place(name: str) -> Break:
    """A slot, or the state over it, that does not do one of the things it should."""
    kind = StaticCacheState if hasattr(StaticCacheState, name) else DecodeBuffers
    return lambda subject, patch: patch.setattr(kind, name, lambda self, *given: None)


def displaced(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """New entries one place too far back."""
    give = DecodeBuffers.write_inputs
    patch.setattr(DecodeBuffers, "write_inputs", lambda self, inputs, length: give(self, inputs, length - 1))


def louder(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Logits one percent too large: the same words, other scores."""
    decode = subject.model.runtime.decode
    patch.setattr(subject.model.runtime, "decode", lambda inputs, state: 1.01 * decode(inputs, state))


def refused(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """A verdict that isn't one."""
    patch.setattr(checks, "verification_of", lambda folder: {"passed": False, "failures": ["logits"]})


def twice(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Every weight stored twice."""
    summary: Mapping[str, Any] = subject.artifacts["merge"].summary
    patch.setitem(summary, "merged_bytes", 2 * summary["decode_bytes"])  # type: ignore[arg-type]


def wide(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """Most of a graph left in FP32."""
    patch.setitem(subject.fp16_artifacts["convert"].summary["decode"], "nodes", 0.4)


def silent(subject: testing.Subject, patch: pytest.MonkeyPatch) -> None:
    """A `generate` that tells its streamer nothing."""
    generate = subject.model.generate
    patch.setattr(subject.model, "generate", lambda streamer=None, **given: generate(**given))


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (checks.verified, refused),
        (checks.weights_once, twice),
        (checks.mostly_fp16, wide),
        (checks.streaming, silent),
        (checks.greedy, changed(later)),
        (checks.greedy, changed(unmasked)),
        (checks.padding, changed(unmasked)),
        (checks.beams, forgetful("reorder")),
        (checks.sampling, changed(later)),
        (checks.without_cache, changed(later)),
        (checks.lengths, changed(later)),
        (checks.end_tokens, changed(later)),
        (checks.scores, louder),
        (checks.processors, changed(later)),
        (checks.assisted, forgetful("crop")),
        (checks.prompts, changed(later)),
        (checks.second_turn, changed(later)),
        (checks.static_caches, in_place("reorder")),
        (checks.static_caches, in_place("write")),
        (checks.static_caches, displaced),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_check_fails_when_what_it_guards_breaks(
    gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, check: testing.Check, broken: Break
) -> None:
    check(gpt2)
    broken(gpt2, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):  # a graph may also refuse what no longer fits together
        check(gpt2)
