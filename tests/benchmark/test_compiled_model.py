"""`torch_compiled_max`: PyTorch's model, compiled, under accel's loops, gives the tokens of PyTorch's `generate`."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from accel.benchmark import compiled_model as module
from accel.benchmark.backends import BACKENDS, Sources, loaded_model
from accel.benchmark.compiled_model import compiled_model
from accel.benchmark.timer import fixed_length_options, time_generation
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError
from accel.models.generation import Generates
from tests.families import GPT, LLAMA
from tests.random_t5 import random_t5

NEW = {"max_new_tokens": 10, "min_new_tokens": 10, "no_repeat_ngram_size": 1}


def model_of(family: str) -> Generates:
    torch.manual_seed(1)
    if family == "t5":
        return random_t5()
    config = LlamaConfig(**LLAMA) if family == "llama" else GPT2Config(**GPT)
    return (LlamaForCausalLM(config) if family == "llama" else GPT2LMHeadModel(config)).eval()


def padded_inputs(model: Generates, length: int = 7) -> dict[str, torch.Tensor]:
    """Return two rows, the second with padding: at the end for an encoder, at the beginning else."""
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, slice(4, None) if model.config.is_encoder_decoder else slice(0, 3)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing be compiled; return the modes that are asked for."""
    modes: list[str] = []

    def kept(function: object, *, mode: str, dynamic: bool) -> object:
        modes.append(mode)
        return function

    monkeypatch.setattr(module.torch, "compile", kept)
    return modes


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_same_tokens_without_the_compiler(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy search and beams, in a padded batch, through buffers that are used again by other inputs."""
    modes = uncompiled(monkeypatch)
    eager = model_of(family)
    model = compiled_model(eager)
    assert modes == ["max-autotune-no-cudagraphs"]
    for length in (7, 7, 9):
        for options in ({}, {"num_beams": 3}):
            inputs = padded_inputs(eager, length)
            inputs["input_ids"] += len(modes) + length
            expected = eager.generate(**inputs, **NEW, **options)
            assert torch.equal(model.generate(**inputs, **NEW, **options), expected)
            assert len(expected[0, -10:].unique()) == 10
    assert len(model.runtime._spare) == 4  # rows of greedy search and of beams, two lengths


@pytest.mark.slow
@pytest.mark.parametrize(("family", "beams"), [("t5", 3), ("llama", 1)])
def test_same_tokens(family: str, beams: int) -> None:
    """As compiled: the second generation compiles nothing."""
    torch._dynamo.reset()
    eager = model_of(family)
    model = compiled_model(eager)
    inputs = padded_inputs(eager)
    expected = eager.generate(**inputs, **NEW, num_beams=beams)
    assert torch.equal(model.generate(**inputs, **NEW, num_beams=beams), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model.generate(**inputs, **NEW, num_beams=beams), expected)


def test_the_backend(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One latency a token, marked as compiled, by as many threads as torch has."""
    uncompiled(monkeypatch)
    backend = BACKENDS["torch_compiled_max"]
    threads: list[int] = []
    original = module.CompiledRuntime.decode

    def noted(*arguments: object) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(module.CompiledRuntime, "decode", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with loaded_model(backend.model, Sources(str(tiny), "", "", {}, RuntimeConfig(name="cpu"))) as model:
            timing = time_generation(model, padded_inputs(model), fixed_length_options(5, 1, use_cache=True))
    finally:
        torch.set_num_threads(before)
    assert (len(timing.latencies), timing.compiled, timing.engine) == (5, True, "inductor")
    assert set(threads) == {2}


def test_what_it_does_not_run() -> None:
    config = MistralConfig(**(LLAMA | {"sliding_window": 4}))
    model = compiled_model(MistralForCausalLM(config).eval())
    with pytest.raises(AccelError, match="torch_compiled_max can't run a model with a sliding window"):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what torch misses, in one line."""

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nmore")

    monkeypatch.setattr(module.torch, "compile", lambda *_, **__: fail)
    model = compiled_model(model_of("t5"))
    with pytest.raises(AccelError, match=r"torch.compile can't compile .*: No working C\+\+ compiler found$"):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "beams"), [("t5", 1), ("t5", 3), ("llama", 1)])
def test_same_tokens_on_a_gpu(family: str, beams: int) -> None:
    """Replayed as a CUDA graph, over buffers that a later generation uses again."""
    torch._dynamo.reset()
    eager = model_of(family).to("cuda")
    model = compiled_model(eager)
    for length in (7, 7, 7, 9, 7):
        inputs = {name: tensor.to("cuda") for name, tensor in padded_inputs(eager, length).items()}
        expected = eager.generate(**inputs, **NEW, num_beams=beams)
        assert torch.equal(model.generate(**inputs, **NEW, num_beams=beams), expected)
