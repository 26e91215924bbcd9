"""Logits recorded during a generation stand for those of decoding the same tokens one by one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.adapters import registry
from accel.evaluation import parity
from accel.evaluation.recorded_generation import RecordedGeneration, logits_along, recording
from accel.evaluation.reference_data import PATHS, read_paths
from accel.models.loading import open_model
from accel.pipeline.runner import Pipeline
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from accel.stages import reference, torch_error, verify, verify_tokens
from accel.testing import random_model
from tests.conftest import Build
from tests.families import FAMILIES


@pytest.fixture(params=["t5", pytest.param("llama", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """Folder of a tiny model with random weights."""
    if request.param == "t5":
        return tiny
    random_model(FAMILIES[request.param]).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("fault", [None, "logits", "tokens"])
def test_logits_of_greedy_search_are_compared(
    build: Build, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    """A step whose logits are off is found; where it makes other tokens follow, PyTorch's are decoded once more."""
    config, artifacts = build(checkpoint, "verify")
    architecture = registry.build(config.architecture)
    pipeline = Pipeline(config, architecture)
    expected = pipeline.artifact("reference").folder
    torch_errors = torch_error.read_errors(pipeline.artifact("torch_error").folder)
    real, steps = DynamicCacheRuntime.decode, list[int]()

    def decode(self: DynamicCacheRuntime, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        logits = real(self, inputs, state)
        steps.append(inputs["input_ids"].shape[1])
        if fault is None or len(steps) != 5:
            return logits
        changed = logits.clone()
        if fault == "tokens":
            changed[0, -1, -3:] = 2 * changed.max()  # one of these ids wasn't generated yet
        else:
            changed[0, -1, changed[0, -1].argmin()] *= 0.5
        return changed

    monkeypatch.setattr(DynamicCacheRuntime, "decode", decode)
    verification = parity.VerificationResult(threshold=verify.threshold("float32", 2))
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        inputs, _ = reference.verification_inputs(config, checkpoint, architecture, model.config, [])
        known, recorded = verify_tokens.generate_greedily(model, config, inputs)
        generated, paths = len(steps), list(read_paths(expected))
        same = [ids == path.ids[0].tolist() for ids, path in zip(known["greedy"], paths, strict=True)]
        parity.compare_paths(model, architecture, expected, torch_errors, verification, 0.0, recorded)
    assert len(recorded) == len(paths) == PATHS
    assert same == [fault != "tokens", True, True, True]
    assert bool(verification.failures) is (fault == "logits")
    assert all("a generation, input 0" in failure for failure in verification.failures)
    again = len(steps) - generated  # the last token of each, and where tokens differ all of them
    assert again == PATHS if fault != "tokens" else again > PATHS


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        ([[9], [0], [1], [2], [3], [4]], 5),  # a first token that isn't returned
        ([[0, 1], [2], [3], [4]], 3),  # two first tokens
        ([[0], [1], [2], [3]], 3),  # a step is missing
        ([[0], [1, 2], [3], [4]], 3),  # two tokens at once
    ],
)
def test_logits_of_other_tokens_stand_for_nothing(tokens: list[list[int]], steps: int) -> None:
    """Such as in Whisper, whose `generate` gives its decoder tokens that it doesn't return."""
    logits = torch.zeros(1, 1, 9)
    given = [torch.tensor([each]) for each in tokens]
    generation = RecordedGeneration(given, logits, [torch.zeros(1, len(each), 9) for each in tokens[1:]], None)
    assert len(generation.steps) == steps
    assert logits_along(Any, generation, torch.arange(6)[None], 1) is None  # type: ignore[arg-type]


def test_recorded_logits_are_those_of_decoding_again(build: Build, checkpoint: Path) -> None:
    """At every token: within the prompt, at each step, and after the last token."""
    config, artifacts = build(checkpoint, "verify")
    architecture = registry.build(config.architecture)
    paths = read_paths(Pipeline(config, architecture).artifact("reference").folder)
    method = reference.cases(config)["greedy"]
    with open_model(artifacts["verify"].folder, config.runtime) as model:
        inputs, _ = reference.verification_inputs(config, checkpoint, architecture, model.config, [])
        with recording(model.runtime, 2) as generations:
            decoded = reference.decode_case(model, "greedy", method, inputs, config.verify)
        assert [generation is not None for generation in generations] == [True, True] + [False] * (len(decoded) - 2)
        assert "decode" not in vars(model.runtime)
        for ids, generation, path in zip(decoded, generations[:2], paths, strict=False):
            assert generation is not None
            assert len(generation.steps) > 5
            assert path.ids.tolist() == [ids]
            prompt = 1 if model.config.is_encoder_decoder else path.inputs["input_ids"].shape[1]
            found = logits_along(model.runtime, generation, path.ids, prompt)
            assert found is not None
            torch.testing.assert_close(found.double(), path.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found, parity._path_logits(model, architecture, path), rtol=1e-5, atol=1e-5)
            del generation.steps[3:5]
            assert logits_along(model.runtime, generation, path.ids, prompt) is None
