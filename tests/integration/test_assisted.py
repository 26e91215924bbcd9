"""Assisted and prompt-lookup decoding on a model that was trained to repeat its prompt: random ones accept nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from tests.conftest import Build

VOCABULARY, PERIOD, NEW = 40, 8, 48
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

pytestmark = pytest.mark.slow


def repetitions(rows: int, times: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids [rows, PERIOD * times] that repeat every PERIOD tokens."""
    return torch.randint(3, VOCABULARY, (rows, PERIOD), generator=generator).repeat(1, times)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, trained on text that repeats itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        ids = repetitions(32, 6, generator)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("repeating") / "checkpoint"
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["dynamic", "static"])
def model(request: pytest.FixtureRequest, build: Build, checkpoint: Path) -> Iterator[AcceleratedModel]:
    folder = build(checkpoint, "merge", ("runtime.static=true", "precision=fp32"))[1]["merge"].folder
    with load(folder, runtime="cpu", static=request.param, buckets=[32, 64]) as opened:
        yield opened


@pytest.mark.parametrize("assistant", ["prompt lookup", "model"])
def test_accepted_candidates(model: AcceleratedModel, checkpoint: Path, assistant: str) -> None:
    """Tokens are PyTorch's, across buckets, from fewer steps, and the acceptance is what the steps say."""
    eager: Any = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 6} if assistant == "prompt lookup" else {}
    if assistant == "model":
        options["assistant_model"] = eager
    runtime: Any = model.runtime
    decode, steps = runtime.decode, []
    runtime.decode = lambda inputs, state: steps.append(inputs["input_ids"].shape[1]) or decode(inputs, state)
    try:
        for seed in (2, 3):
            prompt = repetitions(1, 3, torch.Generator().manual_seed(seed))
            expected = eager.generate(prompt, **GREEDY)
            assert len(set(expected[0, prompt.shape[1] :].tolist())) >= PERIOD - 2
            steps.clear()
            assert torch.equal(model.generate(prompt, **GREEDY, **options), expected)
            counts = model.acceptance
            assert counts is not None
            assert max(steps) > 1
            assert counts.steps <= NEW / 2
            assert counts.rate > 0.5
            assert counts.accepted + counts.steps >= NEW
            assert f"{counts.rate:.0%} of {counts.candidates} candidate tokens accepted" in str(counts)
    finally:
        del runtime.decode


def test_an_assistant_that_is_always_wrong(model: AcceleratedModel, checkpoint: Path) -> None:
    """Its candidates are counted as rejected, and the tokens stay PyTorch's."""
    eager: Any = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    wrong: Any = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        wrong.lm_head.weight.copy_(wrong.lm_head.weight.roll(1, 0))  # the id after the one that is meant
    prompt = repetitions(1, 3, torch.Generator().manual_seed(4))
    expected = eager.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY, assistant_model=wrong), expected)
    assert model.acceptance is not None
    assert model.acceptance.rate < 0.1
