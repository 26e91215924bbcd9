"""Speed of single stages and single decoder calls, on a T5 of t5-small's dimensions with fewer layers.

    python -m pytest tests/benchmarks -o addopts= --benchmark-columns=median,min,max,rounds

Left out of a plain `pytest`. Nothing here asserts a time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from accel.adapters import registry
from accel.adapters.types import Component
from accel.benchmark.backends import Sources, open_two_files, torch_model
from accel.benchmark.timer import fixed_length_options
from accel.config.schema import Config
from accel.graph import files
from accel.models.loading import open_model
from accel.pipeline.store import Artifact
from accel.stages import merge
from tests.conftest import Build
from tests.random_t5 import random_t5

pytest.importorskip("pytest_benchmark")

PAST = 32  # tokens in the cache when a step is timed
SOURCE = 32
SHAPE = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "vocab_size": 8000}
Benchmark = Any  # pytest-benchmark's fixture


@pytest.fixture(scope="module")
def made(build: Build, shared: Path) -> tuple[Config, dict[str, Artifact], Path]:
    folder = shared / "wide"
    random_t5(**SHAPE).save_pretrained(folder)
    config, artifacts = build(folder, "[convert,merge]")
    return config, artifacts, folder


@pytest.fixture(scope="module")
def sources(made: tuple[Config, dict[str, Artifact], Path]) -> Sources:
    config, artifacts, folder = made
    signature = registry.build(config.architecture).signature(AutoConfig.from_pretrained(folder), Component.DECODE)
    return Sources(
        str(folder), str(artifacts["merge"].folder), str(artifacts["convert"].folder), signature.cache, config.runtime
    )


@pytest.fixture(params=["merged", "two files"])
def accelerated(request: pytest.FixtureRequest, sources: Sources) -> Iterator[Any]:
    opened = (
        open_two_files(sources)
        if request.param == "two files"
        else open_model(Path(sources.deployable), sources.runtime)
    )
    with opened as model:
        yield model


def _source() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(2, SOURCE + 2)[None]
    return ids, torch.ones_like(ids)


def _prefilled(model: Any, tokens: int) -> Any:
    """A state that has seen `tokens` tokens."""
    ids, mask = _source()
    hidden = model.runtime.encode({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    inputs = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    return model.runtime.prefill({"input_ids": torch.full((1, tokens), 5), **inputs})


@pytest.mark.benchmark(group="one decoder step")
def test_onnx_step(benchmark: Benchmark, accelerated: Any) -> None:
    _, state = _prefilled(accelerated, PAST)
    ids = torch.full((1, 1), 5)

    def decode() -> None:
        accelerated.runtime.decode({"input_ids": ids}, state)
        state.crop(PAST)

    benchmark(decode)
    assert state.length == PAST


@pytest.mark.benchmark(group="one decoder step")
def test_torch_step(benchmark: Benchmark, sources: Sources) -> None:
    model = torch_model(sources)
    ids, mask = _source()
    with torch.inference_mode():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        given = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}
        cache = model(decoder_input_ids=torch.full((1, PAST), 5), **given).past_key_values

        def decode() -> None:
            model(decoder_input_ids=torch.full((1, 1), 5), past_key_values=cache, **given)
            cache.crop(-1)

        benchmark(decode)
    assert cache.get_seq_length() == PAST


@pytest.mark.benchmark(group="prefill")
def test_onnx_prefill(benchmark: Benchmark, accelerated: Any) -> None:
    logits, state = benchmark(lambda: _prefilled(accelerated, 1))
    assert logits.shape == (1, 1, SHAPE["vocab_size"])
    assert state.length == 1


@pytest.mark.benchmark(group="generate 16 tokens")
@pytest.mark.parametrize("beams", [1, 4])
def test_generate(benchmark: Benchmark, accelerated: Any, beams: int) -> None:
    ids, mask = _source()
    options = fixed_length_options(16, beams, use_cache=True)
    found = benchmark(lambda: accelerated.generate(input_ids=ids, attention_mask=mask, **options))
    assert found.shape == (1, 17)


@pytest.mark.benchmark(group="opening")
def test_open(benchmark: Benchmark, sources: Sources) -> None:
    benchmark(lambda: open_model(Path(sources.deployable), sources.runtime).close())


@pytest.mark.benchmark(group="stages")
def test_merge_pass(benchmark: Benchmark, made: tuple[Config, dict[str, Artifact], Path], sources: Sources) -> None:
    config, artifacts, _ = made
    folder = artifacts["convert"].folder

    def load() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            files.load(folder / "decode.onnx"),
            files.load(folder / "prefill.onnx"),
            config.merge,
            sources.cache,
        ), {}

    merged = benchmark.pedantic(merge.merge, backend=load, rounds=5)
    assert files.node_count(merged) > 0


@pytest.mark.benchmark(group="stages")
def test_optimize_stage(
    benchmark: Benchmark, build: Callable[..., Any], made: tuple[Config, dict[str, Artifact], Path], tmp_path: Path
) -> None:
    from accel.stages import optimize

    config, _, folder = made
    _, artifacts = build(folder, "export")
    architecture = registry.build(config.architecture)
    summary = benchmark.pedantic(
        optimize.run, args=(config, {"export": artifacts["export"]}, architecture, tmp_path), rounds=3
    )
    assert summary["nodes"]
