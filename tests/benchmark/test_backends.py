"""Backends: which fit a device, how PyTorch's models are loaded, and how they are scheduled."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accel.benchmark.backends import (
    BACKENDS,
    CAPTURED,
    OURS,
    TORCH,
    TORCH_FP32,
    Sources,
    deployable_backend,
    kept_in_fp32,
    loaded_model,
    select_backends,
)
from accel.benchmark.schedule import run_interleaved, time_backends, warmup_tokens
from accel.benchmark.timer import Timing
from accel.config.schema import BenchmarkConfig, RuntimeConfig
from accel.errors import AccelError
from accel.models.checkpoints import load_model

COMPILED, MAX, AUTOCAST = "torch_static_compiled", "torch_compiled_max", "torch_autocast"


def test_backends_fit_the_device() -> None:
    """Without a selection all backends that fit run: on CUDA also compiled PyTorch and autocast."""
    cpu, cuda = RuntimeConfig(name="cpu"), RuntimeConfig(name="cuda", device="cuda:0")
    assert select_backends([], replace(cuda, capture=True)) == list(BACKENDS)
    assert set(BACKENDS) - set(select_backends([], cuda)) == {CAPTURED}
    assert set(BACKENDS) - set(select_backends([], cpu)) == {COMPILED, MAX, AUTOCAST, CAPTURED}
    assert select_backends([COMPILED], cuda) == [COMPILED]
    assert select_backends([MAX], cpu) == [MAX], "minutes, for who asks for it"
    with pytest.raises(AccelError, match="'onnx_captured' needs runtime=cuda-graph"):
        select_backends([CAPTURED], cuda)


def test_what_compiles_shares_no_process() -> None:
    """A process holds one model: the compiler's threads and streams can't touch another backend's figures."""
    compiled = [name for name, backend in BACKENDS.items() if backend.compiled]
    assert sorted(compiled) == [MAX, COMPILED]
    for name in compiled:
        sharing = [other for other, backend in BACKENDS.items() if backend.model == BACKENDS[name].model]
        assert sharing == [name]


def test_captured_is_compared_with_a_dynamic_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runtime captures, the merged decoder has a dynamic cache; elsewhere it is opened as configured."""
    opened: list[tuple[bool, bool]] = []  # static and capture of each runtime

    def recorded(folder: Path, runtime: RuntimeConfig) -> nullcontext[None]:
        opened.append((runtime.static, runtime.capture))
        return nullcontext()

    monkeypatch.setattr("accel.benchmark.backends.open_model", recorded)
    graph, plain = RuntimeConfig(name="g", static=True, capture=True), RuntimeConfig(name="p", static=True)
    for runtime in (graph, plain):
        for name in (CAPTURED, OURS):
            with loaded_model(BACKENDS[name].model, Sources("", "", "", {}, runtime)):
                pass
    assert opened == [(True, True), (False, False), (True, False), (True, False)]
    assert (deployable_backend(graph), deployable_backend(plain)) == (CAPTURED, OURS)


def test_time_budget() -> None:
    """A backend past its time budget gets no more repeats, each gets at least one, and warm-ups don't count.

    Generations of one token have a budget of their own: with a slow backend too, their median is one of several.
    """
    seconds = {"torch_no_cache": 50.0, "torch_cache": 20.0, "onnx_merged": 1.0}
    first = {"torch_no_cache": 25.0, "torch_cache": 2.0, "onnx_merged": 0.5}
    generated: list[tuple[str, int]] = []

    def generate(name: str, new_tokens: int) -> Timing:
        generated.append((name, new_tokens))
        return Timing(total=(first if new_tokens == 1 else seconds)[name])

    point = BenchmarkConfig(new_tokens=200, repeats=5, warmup=2, warmup_tokens=16, time_budget_s=45.0)
    found = run_interleaved(list(seconds), point, generate)
    assert {length: [len(timings[name]) for name in seconds] for length, timings in found.items()} == {
        200: [1, 3, 5],
        1: [2, 5, 5],
    }
    assert all(timing.total == first[name] for name, timings in found[1].items() for timing in timings)
    assert generated[:12] == [(name, length) for name in seconds for length in (16, 1)] * 2
    assert generated[12:18] == [(name, length) for name in seconds for length in (200, 1)]  # interleaved
    assert {length for _, length in generated[18:]} == {200, 1}
    generated.clear()
    found = run_interleaved(list(seconds), BenchmarkConfig(repeats=5, time_budget_s=None), generate)
    assert {len(timings) for by_name in found.values() for timings in by_name.values()} == {5}
    found = run_interleaved(["torch_no_cache"], BenchmarkConfig(time_budget_s=0.0), generate)
    assert {length: len(timings["torch_no_cache"]) for length, timings in found.items()} == {64: 1, 1: 1}


def test_one_new_token_is_measured_once() -> None:
    """Where one token is all that is asked for, its generations aren't repeated for the time to first token."""
    generated: list[int] = []

    def generate(name: str, new_tokens: int) -> Timing:
        generated.append(new_tokens)
        return Timing(total=1.0)

    found = run_interleaved(["torch_cache"], BenchmarkConfig(new_tokens=1, repeats=3, warmup=2), generate)
    assert generated == [1] * 5
    assert {length: len(timings["torch_cache"]) for length, timings in found.items()} == {1: 3}


def test_warm_up_of_compiled_backends_has_full_length() -> None:
    point = BenchmarkConfig(new_tokens=100, warmup_tokens=16)
    names = ("torch_cache", COMPILED, MAX, CAPTURED)
    assert [warmup_tokens(name, point) for name in names] == [16, 100, 100, 100]
    point.num_beams = 4  # transformers' beam search doesn't compile
    assert [warmup_tokens(name, point) for name in (COMPILED, MAX)] == [16, 100]
    assert warmup_tokens("torch_no_cache", BenchmarkConfig(new_tokens=100, warmup_tokens=None)) == 100
    assert warmup_tokens("torch_no_cache", BenchmarkConfig(new_tokens=4, warmup_tokens=16)) == 4


def test_torch_baseline_is_what_people_run(tiny: Path) -> None:
    """PyTorch runs with transformers' own choice of attention, not with the export's."""
    sources = Sources(str(tiny), "", "", {}, RuntimeConfig(name="cpu"))
    with loaded_model("torch", sources) as model:
        assert model.config._attn_implementation == "sdpa"
        assert model.dtype == torch.float32


def test_half_precision_keeps_what_transformers_keeps(tiny: Path) -> None:
    """Loaded as users load it, an FP16 T5 has FP32 output projections in its feed-forward layers, 2 and 3 of them."""
    model = load_model(tiny, torch.float16, None)
    assert model.dtype == torch.float16
    assert kept_in_fp32(model) == {"wo": 5}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_torch_models_on_cuda(tiny: Path) -> None:
    """PyTorch's FP16 keeps `wo` in FP32; autocast has FP32 weights and makes FP16 logits."""
    sources = Sources(str(tiny), "", "", {}, RuntimeConfig(name="cuda", device="cuda"), "float16")
    with loaded_model(TORCH, sources) as model:
        assert kept_in_fp32(model) == {"wo": 5}
    with loaded_model(TORCH_FP32, sources) as model, BACKENDS[AUTOCAST].context():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        ids = torch.arange(2, 9, device="cuda")[None]
        assert model(input_ids=ids, decoder_input_ids=ids[:, :1]).logits.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("beams", [1, 2])
def test_cuda_only_backends(tiny: Path, beams: int) -> None:
    """They generate the number of tokens asked for; greedy search compiles, beam search doesn't."""
    sources = Sources(str(tiny), "", "", {}, RuntimeConfig(name="cuda", device="cuda"), "float16")
    ids = torch.arange(2, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    point = BenchmarkConfig(new_tokens=20, num_beams=beams, repeats=2, warmup=1)
    measured = time_backends([COMPILED, AUTOCAST], sources, inputs, point)
    for name, timings in measured.timings.items():
        assert [len(timing.tokens[0]) for timing in timings] == [1 + 20] * 2
        assert all(timing.compiled is (BACKENDS[name].compiled and beams == 1) for timing in timings)
    assert measured.fp32 == {"wo": 5}
