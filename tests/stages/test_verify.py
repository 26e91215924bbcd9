"""What verify looks at would change if generation went wrong."""

from pathlib import Path

import pytest
from torch import Tensor

from accel import registry
from accel.loading import open_model
from accel.pipeline import Pipeline
from accel.runtime.onnx import GrowingRuntime, GrowingState
from accel.stages import reference, verify
from tests.conftest import Build


@pytest.mark.parametrize("late", [None, 2, 9])
def test_a_step_that_sees_a_stale_cache_is_found(
    build: Build, tiny: Path, monkeypatch: pytest.MonkeyPatch, late: int | None
) -> None:
    """One step in a generation forgets the newest token, as a copy that comes too late would have it."""
    config, artifacts = build(tiny, "verify")
    architecture = registry.build(config.architecture)
    expected = Pipeline(config, architecture).artifact("reference").folder
    real, calls = GrowingRuntime.step, iter(range(10_000))

    def step(self: GrowingRuntime, ids: Tensor, state: GrowingState) -> Tensor:
        if next(calls) == late:
            state.crop(state.length - 1)
        return real(self, ids, state)

    monkeypatch.setattr(GrowingRuntime, "step", step)
    verdict = verify.Verdict(threshold=verify.threshold("float32", 2))
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        chosen, _ = reference.fixed_inputs(tiny, None, architecture, model.config, config.verify)
        verify.compare_paths(model, architecture, chosen, expected, verdict)
    assert "path.logits" in verdict.outputs
    assert bool(verdict.failures) is (late is not None)
    assert all(failure.startswith("path.logits") for failure in verdict.failures)
