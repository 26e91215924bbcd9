"""Timer: times every decoder call, doesn't change the generation, and restores the model."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import CompileConfig

from accel import testing
from accel.benchmark.backends import BACKENDS, TORCH, Sources, loaded_model
from accel.benchmark.timer import BackgroundLoad, GenerationTimer, fixed_length_options, time_generation
from accel.config.schema import RuntimeConfig
from accel.models.loading import open_model
from tests.conftest import Build

COMPILED, AUTOCAST = "torch_static_compiled", "torch_autocast"
PATCHED = {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "get_compiled_call", "forward"}
PATCHED_RUNTIME = {"encode", "prefill", "decode"}


@pytest.mark.parametrize("name", ["torch", "merged"])
def test_timer_restores_the_model(build: Build, tiny: Path, name: str) -> None:
    """Timing counts every decoder call, and afterwards the model is as before."""
    config, artifacts = build(tiny, "merge")
    sources = Sources(str(tiny), str(artifacts["merge"].folder), "", {}, config.runtime)
    ids = torch.arange(2, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with loaded_model(name, sources) as model:
        plain = model.generate(**inputs, **fixed_length_options(5, 1, use_cache=True))
        timing = time_generation(model, inputs, fixed_length_options(5, 1, use_cache=True))
        assert timing.tokens == plain.tolist()
        assert len(timing.latencies) == 5
        assert min(timing.latencies) > 0
        assert 0 < timing.inside <= timing.total
        assert sum(timing.latencies) <= timing.total
        assert not PATCHED & set(vars(model))
        assert not PATCHED_RUNTIME & set(vars(getattr(model, "runtime", model)))
        assert "forward" not in vars(model.get_encoder())


@pytest.mark.parametrize("beams", [1, 2])
def test_timer_and_compiled_calls(tiny: Path, beams: int) -> None:
    """Transformers compiles under the timer as without it: once, and with the same tokens.

    A generation of one token in between compiles nothing, and nothing is compiled again after it.
    """
    graphs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiling = CompileConfig(backend=backend, mode="default")
    compiling._compile_all_devices = True  # the CPU too
    compiled_options = {**BACKENDS[COMPILED].generate_options, "compile_config": compiling}
    ids = torch.arange(2, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sources = Sources(str(tiny), "", "", {}, RuntimeConfig(name="cpu"))
    with loaded_model(TORCH, sources) as model:
        plain = model.generate(**inputs, **fixed_length_options(6, beams, use_cache=True))
        options = fixed_length_options(6, beams, use_cache=True) | compiled_options
        with BACKENDS[COMPILED].context():
            first = time_generation(model, inputs, options)
            compiled_graphs = len(graphs)
            single = time_generation(model, inputs, options | fixed_length_options(1, beams, use_cache=True))
            second = time_generation(model, inputs, options)
        assert first.compiled is second.compiled is (beams == 1) is BACKENDS[COMPILED].needs_full_warmup(beams)
        assert (compiled_graphs > 0) is (beams == 1)
        assert len(graphs) == compiled_graphs
        assert first.tokens == second.tokens == plain.tolist()
        assert len(second.latencies) == 6
        assert len(single.latencies) == 1
        if beams == 1:
            assert single.tokens == [ids[:2] for ids in plain.tolist()]  # the decoder's start token and one new
    torch.compiler.reset()


def test_timer_restores_the_model_after_an_error(build: Build, tiny: Path) -> None:
    config, artifacts = build(tiny, "merge")
    with open_model(artifacts["merge"].folder, config.runtime) as model:
        with pytest.raises(ValueError, match="decoder_input_ids"), GenerationTimer(model):
            model.forward()
        assert not PATCHED & set(vars(model))
        assert not PATCHED_RUNTIME & set(vars(model.runtime))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_in_chunks_is_one_call(gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The decoder's calls for single chunks, and for single rows, are part of the time to the first token."""
    monkeypatch.setattr(gpt2.model.runtime, "prefill_chunk", 3)
    timing = time_generation(gpt2.model, gpt2.inputs(rows, length=11), fixed_length_options(5, 1, use_cache=True))
    assert len(timing.latencies) == 5
    assert 0 < timing.inside <= timing.total


SPIN = "import time; end = time.time() + 60\nwhile time.time() < end: pass"


def spinning(orphan: bool) -> int:
    """Start a process that keeps a core busy, a child of this one or an orphan, and return its id."""
    if not orphan:
        return subprocess.Popen([sys.executable, "-c", SPIN]).pid
    command = f"subprocess.Popen({[sys.executable, '-c', SPIN]}, stdout=subprocess.DEVNULL)"
    start = [sys.executable, "-c", f"import subprocess; print({command}.pid)"]
    return int(subprocess.run(start, stdout=subprocess.PIPE, text=True, check=True).stdout)


def test_background_load() -> None:
    """Another process that keeps a core busy is seen; this one's own work and its children's is not."""
    shares = {}
    for orphan in (False, True):
        process = psutil.Process(spinning(orphan))
        try:
            time.sleep(0.2)
            with BackgroundLoad() as load:
                time.sleep(1.0)
                taken = process.cpu_times()
        finally:
            process.kill()
            process.wait()
        shares[orphan] = load.share
        assert taken.user > 0.1
    core = 1 / (os.cpu_count() or 1)
    assert 0.5 * core < shares[True] <= 1
    assert shares[True] > shares[False] + 0.3 * core


@pytest.mark.gpu
def test_timer_on_cuda(tiny: Path) -> None:
    """As many latencies as tokens, which together make up nearly all of the wall clock, and calls inside them."""
    sources = Sources(str(tiny), "", "", {}, RuntimeConfig(name="cuda", device="cuda"), "float16")
    ids = torch.arange(2, 9, device="cuda")[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("torch_cache", AUTOCAST, COMPILED):
        backend = BACKENDS[name]
        with loaded_model(backend.model, sources) as model, backend.context():
            for _ in range(3):
                timing = time_generation(model, inputs, backend.options(40, 1))
        assert len(timing.latencies) == 40
        assert min(timing.latencies) >= 0
        assert 0 < timing.inside < timing.total
        assert 0.8 * timing.total < sum(timing.latencies) < 1.05 * timing.total
        assert timing.compiled is backend.compiled
