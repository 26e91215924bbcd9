"""Positions that a caller chooses: the fused engine's tables have those of a cache's entries and no others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from accel.config.presets import runtime_preset
from accel.models.cache import state_of
from accel.models.loading import open_model
from accel.runtime.decoder_inputs import positions_are_below
from accel.testing import random_model
from tests.conftest import Build
from tests.families import FAMILIES

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize(
    ("positions", "length", "expected"),
    [([[0, 1, 2]], 0, True), ([[1, 2, 3]], 0, False), ([[4]], 4, True), ([[5]], 4, False), ([[-1, 0]], 3, False)],
)
def test_positions_are_below(positions: list[list[int]], length: int, expected: bool) -> None:
    assert positions_are_below(length, {"position_ids": torch.tensor(positions)}) is expected
    assert positions_are_below(length, {})


@pytest.mark.slow
def test_positions_beyond_the_cache_leave_the_tables(build: Build, shared: Path) -> None:
    """Logits are PyTorch's, by growing caches where the fused engine has no entry, and in static ones else."""
    checkpoint = shared / "positions" / "llama"
    if not (checkpoint / "model.safetensors").is_file():
        random_model(FAMILIES["llama"]).save_pretrained(checkpoint)
    folder = build(checkpoint, "merge", ("runtime.static=true",))[1]["merge"].folder
    pytorch: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    static = runtime_preset("cpu", static=True, buckets=[16])
    for engine in ("onnxruntime", "fused"):
        for begin in (0, 40):
            with open_model(folder, replace(static, engine=engine)) as model, torch.inference_mode():
                logits, caches = [], []
                for each in (model, pytorch):
                    output = each(input_ids=IDS, position_ids=begin + torch.arange(4)[None], use_cache=True)
                    next_positions = torch.full((2, 1), begin + 4)
                    past = output.past_key_values
                    output = each(input_ids=IDS[:, :1], position_ids=next_positions, past_key_values=past)
                    logits.append(output.logits.clone())
                    caches.append(output.past_key_values)
                state: Any = state_of(caches[0])
                torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
                assert (state.dynamic is not None) is (engine == "fused" and begin > 0)
