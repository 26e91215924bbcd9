"""What verify looks at would change if generation went wrong."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.adapters import registry
from accel.adapters.types import Role
from accel.evaluation import parity
from accel.evaluation.compare import visible
from accel.models.loading import open_model
from accel.pipeline.runner import Pipeline
from accel.runtime.dynamic_cache import GrowingRuntime, GrowingState
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
    real, calls = GrowingRuntime.step, iter(range(10_000))

    def step(self: GrowingRuntime, feeds: Mapping[str, Tensor], state: GrowingState) -> Tensor:
        if next(calls) == late:
            state.crop(state.length - 1)
        return real(self, feeds, state)

    monkeypatch.setattr(GrowingRuntime, "step", step)
    verdict = parity.Verdict(threshold=verify.threshold("float32", 2))
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        parity.compare_paths(model, architecture, expected, own, verdict)
    assert "path.logits" in verdict.outputs
    assert bool(verdict.failures) is (late is not None)
    assert all(failure.startswith("path.logits") for failure in verdict.failures)


@pytest.mark.parametrize(
    ("role", "name", "shape", "padding"),
    [
        (Role.ENCODER, "last_hidden_state", (2, 5, 8), (1, 4)),
        (Role.PREFILL, "logits", (2, 5, 7), (1, 4)),
        (Role.STEP, "logits", (2, 2, 7), (1, 1)),  # the last two of five
        (Role.STEP, "present.0.key", (2, 4, 5, 8), (1, slice(None), 4)),
    ],
)
def test_padding_is_not_compared(
    role: Role, name: str, shape: tuple[int, ...], padding: tuple[int | slice, ...]
) -> None:
    """What lies under the mask may differ, what doesn't may not; what is not finite may stand nowhere."""
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 4] = 0
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = visible(role, name, {"attention_mask": mask}, expected, {"present.0.key"})
    results = []
    for place, number in ((padding, 9.0), (padding, torch.nan), ((0, *padding[1:]), 9.0)):
        found = expected.clone()
        found[place] = number
        verdict = parity.Verdict(threshold=1e-3)
        parity.measure(verdict, name, "random ids", found, expected, None, shown)
        results.append(bool(verdict.failures))
    assert results == [False, True, True]
