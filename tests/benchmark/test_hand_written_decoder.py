"""The decoder of `scripts/hand_written_decoder.py` computes what transformers' models compute."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from scripts import hand_written_decoder as script
from tests.families import LLAMA
from tests.random_t5 import random_t5

TOKENS = torch.tensor([[0, 17, 4, 99, 31, 58, 70], [0, 88, 12, 63, 5, 41, 23]])


def llama() -> PreTrainedModel:
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, rms_norm_eps=1e-5)).eval()


def by_steps(decoder: script.Decoder, first: int) -> torch.Tensor:
    """Return the logits of the first tokens at once, and then of one after the other."""
    positions = torch.arange(TOKENS.shape[1])
    logits = [decoder(TOKENS[:, :first], positions[:first])]
    logits += [decoder(TOKENS[:, at : at + 1], positions[at : at + 1]) for at in positions[first:].tolist()]
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 3])
def test_t5(first: int) -> None:
    """Beside an encoder, with one row of its output padded."""
    model = random_t5()
    ids = torch.tensor([[5, 9, 40, 17, 8], [7, 6, 3, 0, 0]])
    mask = (ids > 0).long()
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=TOKENS).logits
    found = by_steps(script.of_t5(model, hidden, mask, 12), first)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 3])
def test_llama(first: int) -> None:
    """With keys and values that several queries share."""
    model = llama()
    found = by_steps(script.of_llama(model, 2, 12), first)
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [random_t5, llama])
def test_greedy_tokens(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated twice, in the same buffers; the decoder's bytes are those of its parameters and caches."""
    monkeypatch.setattr(script.torch, "compile", lambda function, **_: function)
    model = make()
    ids = torch.tensor([[5, 9, 40, 17, 8], [7, 6, 3, 11, 12]])
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)[:, -9:]
    generation = script.begin(model, ids, torch.ones_like(ids), 9)
    for _ in range(2):
        assert torch.equal(generation.run(), expected)


def test_bytes() -> None:
    """Weights once, and keys and values of the source and of half of the new tokens."""
    model = llama()
    count = sum(parameter.numel() for parameter in model.parameters()) - 120 * 64  # one row of the embedding is read
    assert script.bytes_read(model, 3, 5, 8) == 4 * (count + 2 * 3 * 2 * 32 * (5 + 4))
    t5 = random_t5()
    names = [name for name, _ in t5.decoder.named_parameters() if "EncDecAttention.k" in name or "Attention.v" in name]
    assert len(names) == 2 * 2 + 2  # two layers; the values of self-attention are computed in a step
    unread = sum(t5.decoder.get_parameter(name).numel() for name in names if "EncDec" in name)
    own = sum(parameter.numel() for parameter in t5.decoder.parameters())  # with the tied head, once
    assert script.bytes_read(t5, 1, 5, 8) == 4 * (own - unread + 2 * 2 * 64 * 9)


@pytest.mark.slow
def test_measured() -> None:
    """As compiled, on the CPU."""
    torch._dynamo.reset()
    model = random_t5()
    figures = script.measure(model, 1, 6, 8)
    assert figures["multiple_of_limit"] > 0
    times = figures["ms_per_token"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (1, 6), generator=generator)
    with torch.no_grad():
        generation = script.begin(model, ids, torch.ones_like(ids), 8)
        expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, eos_token_id=None)[:, -8:]
        assert torch.equal(generation.run(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [random_t5, llama])
def test_on_a_gpu(make: Any) -> None:
    """Captured, the tokens are those of PyTorch."""
    torch._dynamo.reset()
    model = make().to("cuda")
    ids = torch.tensor([[5, 9, 40, 17, 8], [7, 6, 3, 11, 12]], device="cuda")
    expected = model.generate(ids, max_new_tokens=9, min_new_tokens=9, eos_token_id=None)[:, -9:]
    with torch.no_grad(), script.on_shared_stream(model.device):
        generation = script.begin(model, ids, torch.ones_like(ids), 9)
        for _ in range(3):
            assert torch.equal(generation.run(), expected)
