"""`verify` detects faults that occur during a generation, and ignores padding."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.adapters import registry
from accel.adapters.types import Component
from accel.evaluation import parity
from accel.evaluation.compare import output_mask
from accel.models.loading import open_model
from accel.pipeline.runner import Pipeline
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from accel.stages import torch_error, verify
from tests.conftest import Build


@pytest.mark.parametrize("stale_call", [None, 2, 9])
def test_decode_step_with_a_stale_cache_is_found(
    build: Build, tiny: Path, monkeypatch: pytest.MonkeyPatch, stale_call: int | None
) -> None:
    """A decode step whose cache lacks the newest token, as after a late copy, fails verification."""
    config, artifacts = build(tiny, "verify")
    architecture = registry.build(config.architecture)
    pipeline = Pipeline(config, architecture)
    expected = pipeline.artifact("reference").folder
    torch_errors = torch_error.read_errors(pipeline.artifact("torch_error").folder)
    real, calls = DynamicCacheRuntime.decode, iter(range(10_000))

    def decode(self: DynamicCacheRuntime, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        if next(calls) == stale_call:
            state.crop(state.length - 1)
        return real(self, inputs, state)

    monkeypatch.setattr(DynamicCacheRuntime, "decode", decode)
    verification = parity.VerificationResult(threshold=verify.threshold("float32", 2))
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        parity.compare_paths(model, architecture, expected, torch_errors, verification)
    assert "path.logits" in verification.outputs
    assert bool(verification.failures) is (stale_call is not None)
    assert all(failure.startswith("path.logits") for failure in verification.failures)


@pytest.mark.parametrize(
    ("component", "name", "shape", "padding"),
    [
        (Component.ENCODER, "last_hidden_state", (2, 5, 8), (1, 4)),
        (Component.PREFILL, "logits", (2, 5, 7), (1, 4)),
        (Component.DECODE, "logits", (2, 2, 7), (1, 1)),  # the last two of five
        (Component.DECODE, "present.0.key", (2, 4, 5, 8), (1, slice(None), 4)),
    ],
)
def test_padding_is_not_compared(
    component: Component, name: str, shape: tuple[int, ...], padding: tuple[int | slice, ...]
) -> None:
    """Masked values may differ, others may not, and no value may be non-finite."""
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 4] = 0
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compared = output_mask(component, name, {"attention_mask": mask}, expected, {"present.0.key"})
    results = []
    for index, number in ((padding, 9.0), (padding, torch.nan), ((0, *padding[1:]), 9.0)):
        found = expected.clone()
        found[index] = number
        verification = parity.VerificationResult(threshold=1e-3)
        parity.measure(verification, name, "random ids", found, expected, None, compared)
        results.append(bool(verification.failures))
    assert results == [False, True, True]
