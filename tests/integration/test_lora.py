"""A checkpoint with a PEFT adapter end to end: the deployable generates the merged model's tokens, not the base's."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from accel.models.checkpoints import load_model
from accel.models.loading import load, verification_of
from tests.conftest import Build
from tests.families import LLAMA
from tests.lora import merged_by_peft, save_adapter
from tests.random_t5 import random_t5

pytestmark = pytest.mark.slow
TARGETS = {"t5": ["q", "v", "wo"], "llama": ["q_proj", "v_proj", "down_proj"]}
BACKENDS = ["torch_cache", "onnx_merged"]


def base_model(family: str) -> PreTrainedModel:
    """Return a tiny model with random weights."""
    if family == "t5":
        return random_t5()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


@pytest.mark.parametrize("family", TARGETS)
def test_tokens_are_those_of_the_merged_model(build: Build, tmp_path: Path, family: str) -> None:
    """In `verify`, for inputs and options that it did not use, and in the backends that `benchmark` compares."""
    base = tmp_path / f"{family}-base"
    base_model(family).save_pretrained(base)
    lora = LoraConfig(target_modules=TARGETS[family], lora_alpha=16)
    adapter = save_adapter(load_model(base), lora, tmp_path / f"{family}-lora")
    overrides = (
        f"model.peft_adapter={adapter}",
        f"benchmark.backends=[{','.join(BACKENDS)}]",
        "benchmark.memory=false",
        "benchmark.new_tokens=12",
        "benchmark.repeats=1",
    )
    _, artifacts = build(base, "[verify,benchmark]", overrides)
    folder = artifacts["verify"].folder
    verification = verification_of(folder)
    assert verification is not None
    assert verification["passed"]
    assert set(verification["identical"].values()) == {1.0}
    assert json.loads((folder / "certificate.json").read_text())["checkpoint"]["adapter"] == f"{family}-lora"
    assert f"{family}-lora" in (folder / "certificate.html").read_text()
    plain, merged = load_model(base), merged_by_peft(load_model(base), adapter)
    ids = torch.randint(3, 120, (3, 13), generator=torch.Generator().manual_seed(7))
    with load(folder, runtime="cpu") as model:
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            settings = {"max_new_tokens": 17, "no_repeat_ngram_size": 1, "attention_mask": torch.ones_like(ids)}
            expected = merged.generate(ids, **settings, **options)
            assert torch.equal(model.generate(ids, **settings, **options), expected)
            assert not torch.equal(plain.generate(ids, **settings, **options), expected)
    results = json.loads((artifacts["benchmark"].folder / "measurement.json").read_text())["backends"]
    assert {name: results[name]["same_tokens"] for name in BACKENDS} == dict.fromkeys(BACKENDS, True)
