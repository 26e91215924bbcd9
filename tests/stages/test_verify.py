"""What verify looks at would change if generation went wrong."""

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


@pytest.mark.parametrize("late", [None, 2, 9])
def test_a_step_that_sees_a_stale_cache_is_found(
    build: Build, tiny: Path, monkeypatch: pytest.MonkeyPatch, late: int | None
) -> None:
    """One step in a generation forgets the newest token, as a copy that comes too late would have it."""
    config, artifacts = build(tiny, "verify")
    architecture = registry.build(config.architecture)
    pipeline = Pipeline(config, architecture)
    expected = pipeline.artifact("reference").folder
    own = torch_error.read_errors(pipeline.artifact("torch_error").folder)
    real, calls = DynamicCacheRuntime.decode, iter(range(10_000))

    def decode(self: DynamicCacheRuntime, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        if next(calls) == late:
            state.crop(state.length - 1)
        return real(self, inputs, state)

    monkeypatch.setattr(DynamicCacheRuntime, "decode", decode)
    verification = parity.VerificationResult(threshold=verify.threshold("float32", 2))
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        parity.compare_paths(model, architecture, expected, own, verification)
    assert "path.logits" in verification.outputs
    assert bool(verification.failures) is (late is not None)
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
    """What lies under the mask may differ, what doesn't may not; what is not finite may stand nowhere."""
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 4] = 0
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = output_mask(component, name, {"attention_mask": mask}, expected, {"present.0.key"})
    results = []
    for place, number in ((padding, 9.0), (padding, torch.nan), ((0, *padding[1:]), 9.0)):
        found = expected.clone()
        found[place] = number
        verification = parity.VerificationResult(threshold=1e-3)
        parity.measure(verification, name, "random ids", found, expected, None, shown)
        results.append(bool(verification.failures))
    assert results == [False, True, True]
