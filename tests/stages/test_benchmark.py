"""The benchmark's figures: complete, consistent, and of the work that was asked for."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from accel import measure, registry
from accel.clock import Clock, OtherLoad, forced, time_generation
from accel.errors import AccelError
from accel.loading import open_model
from accel.schema import BenchmarkConfig
from accel.setups import SETUPS, Sources, opened
from accel.stages import benchmark
from tests.conftest import Build

POINT = ["benchmark.source_length=5", "benchmark.new_tokens=6", "benchmark.repeats=3", "benchmark.warmup=1"]
QUICK = [*POINT, "benchmark.memory=false"]
PNG = b"\x89PNG"


def test_figures(build: Build, tiny: Path) -> None:
    """All setups, one latency a token, the same tokens, ratios that follow from the totals, both plots."""
    _, artifacts = build(tiny, "benchmark", [*QUICK, "benchmark.num_beams=2", "benchmark.batch_size=3"])
    artifact = artifacts["benchmark"]
    summary = artifact.summary
    measured = json.loads((artifact.folder / benchmark.MEASUREMENT).read_text())
    assert set(summary["setups"]) == set(measured["latencies"]) == set(SETUPS)
    assert summary["point"] | {"new_tokens": 6, "num_beams": 2, "batch_size": 3} == summary["point"]
    assert set(summary["machine"]) >= {"device", "threads", "processor", "torch_threads", "other_load"}
    assert summary["packages"]["torch"] == torch.__version__
    totals = {name: values["total"]["median"] for name, values in summary["setups"].items()}
    for name, values in summary["setups"].items():
        assert values["same_tokens"]
        assert 0 < values["total"]["min"] <= totals[name] <= values["total"]["max"]
        assert 0 < values["inside"]["median"] < totals[name]
        assert values["ms_per_token"] == pytest.approx(1000 * totals[name] / 6)
        assert values["vs_torch_cache"] == pytest.approx(totals["torch+cache"] / totals[name])
        assert values["vs_two_files"] == pytest.approx(totals["onnx+cache, two files"] / totals[name])
        repeats = measured["repeats"][name]
        assert len(repeats) == 3
        assert statistics.median(repeat["total"] for repeat in repeats) == totals[name]
        for repeat in repeats:
            assert len(repeat["latencies"]) == 6
            assert sum(repeat["latencies"]) <= repeat["total"]
            assert [len(ids) for ids in repeat["tokens"]] == [1 + 6] * 3  # the decoder's start token, and no less
    for plot in benchmark.PLOTS:
        assert (artifact.folder / plot).read_bytes().startswith(PNG)


def test_memory(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each process reports what it added; the merged decoder is set against the step graph alone, and shown."""
    chosen = 'benchmark.setups=[onnx+cache,"onnx+cache, two files"]'
    _, artifacts = build(tiny, "benchmark", [*POINT, chosen])
    summary = artifacts["benchmark"].summary
    memory = summary["memory"]
    assert set(memory) == {"onnx+cache", "onnx+cache, two files", measure.STEP_ALONE}
    for name in ("onnx+cache", "onnx+cache, two files"):
        assert memory[name][measure.PEAK] > 0
        assert memory[name][measure.SESSION] > 0
    alone = memory[measure.STEP_ALONE][measure.SESSION]
    assert summary["session_ratio"] == pytest.approx(memory["onnx+cache"][measure.SESSION] / alone)
    assert all(values["vs_torch_cache"] is None for values in summary["setups"].values())  # it did not take part
    drawn = benchmark.rows(summary)
    assert [row[0] for row in drawn] == ["onnx+cache", "onnx+cache, two files", measure.STEP_ALONE]
    assert {len(row) for row in drawn} == {len(benchmark.COLUMNS)}
    benchmark.show(summary)
    assert f"{summary['session_ratio']:.2f}x that of the step graph alone" in capsys.readouterr().out


def test_failing_process_is_named(build: Build, tiny: Path) -> None:
    config, artifacts = build(tiny, "merge")
    sources = Sources(str(tiny), str(artifacts["merge"].folder), "nowhere", {}, config.runtime)
    task = measure.Task(measure.SESSION, measure.STEP_ALONE, sources.dump(), 1, 4, "", {"num_beams": 1})
    with pytest.raises(AccelError, match=r"'step alone' failed.*step\.onnx"):
        measure.measure_all([task], weight_bytes=0)


def test_candidate_only_if_asked(build: Build, tiny: Path) -> None:
    """What is measured has passed `verify`, unless `benchmark.unverified=true`."""
    few = [*QUICK, "benchmark.setups=[onnx+cache]", "benchmark.repeats=1", "benchmark.warmup=0"]
    _, verified = build(tiny, "benchmark", few)
    _, candidate = build(tiny, "benchmark", [*few, "benchmark.unverified=true"])
    assert "verify" in verified["benchmark"].manifest.upstream
    assert "merge" not in verified["benchmark"].manifest.upstream
    assert "merge" in candidate["benchmark"].manifest.upstream
    assert "verify" not in candidate["benchmark"].manifest.upstream


def test_refused() -> None:
    """An unknown setup lists the choices; a setup twice and a negative warm-up are named."""
    with pytest.raises(AccelError, match=r"'tensorrt'.*onnx\+cache, two files.*torch\+cache"):
        benchmark.check(BenchmarkConfig(setups=["torch", "tensorrt"]))
    with pytest.raises(AccelError, match="twice"):
        benchmark.check(BenchmarkConfig(setups=["torch", "torch"]))
    with pytest.raises(AccelError, match="warmup=-1"):
        benchmark.check(BenchmarkConfig(warmup=-1))


def test_inputs_are_not_padded(tiny: Path, build: Build) -> None:
    config, _ = build(tiny, "merge")
    architecture = registry.build(config.architecture)
    described = AutoConfig.from_pretrained(tiny)
    point = BenchmarkConfig(source_length=9, batch_size=4, seed=3)
    given = benchmark.random_inputs(architecture, described, point)
    assert given["input_ids"].shape == (4, 9)
    assert bool(given["attention_mask"].all())
    assert len(given["input_ids"].unique()) > 15
    again = benchmark.random_inputs(architecture, described, point)
    assert torch.equal(given["input_ids"], again["input_ids"])


@pytest.mark.parametrize("engine", ["torch", "merged"])
def test_clock_leaves_no_trace(build: Build, tiny: Path, engine: str) -> None:
    """Timing counts every decoder call, and afterwards the model is as before."""
    config, artifacts = build(tiny, "merge")
    sources = Sources(str(tiny), str(artifacts["merge"].folder), "", {}, config.runtime)
    ids = torch.arange(2, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with opened(engine, sources) as model:
        plain = model.generate(**inputs, **forced(5, 1, use_cache=True))
        timing = time_generation(model, inputs, forced(5, 1, use_cache=True))
        assert timing.tokens == plain.tolist()
        assert len(timing.latencies) == 5
        assert min(timing.latencies) > 0
        assert timing.inside <= timing.total
        assert "forward" not in vars(model)


def test_clock_restores_after_an_error(build: Build, tiny: Path) -> None:
    config, artifacts = build(tiny, "merge")
    with open_model(artifacts["merge"].folder, config.runtime) as model:
        with pytest.raises(ValueError, match="decoder_input_ids"), Clock(model):
            model.forward()
        assert "forward" not in vars(model)
        assert "encode" not in vars(model.runtime)


def test_other_load() -> None:
    """Another process that keeps a core busy is seen; this one's own work is not."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            time.sleep(0.2)
            with OtherLoad() as load:
                time.sleep(1.0)
        finally:
            other.kill()
    assert load.share > 0.5 / (os.cpu_count() or 1)
    assert load.share <= 1


def test_busy_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    point = {"new_tokens": 4, "num_beams": 1, "source_length": 4, "batch_size": 1}
    for share in (0.02, 0.6):
        facts = {"device": "cpu", "threads": 2, "other_load": share}
        benchmark.show(
            {
                "point": point,
                "precision": "float32",
                "machine": facts,
                "setups": {},
                "memory": {},
                "session_ratio": None,
            }
        )
        assert ("other programs took 60%" in capsys.readouterr().err) is (share == 0.6)


def test_torch_baseline_is_what_people_run(tiny: Path) -> None:
    """PyTorch runs with transformers' own choice of attention, not with the export's."""
    runtime = SimpleNamespace(device="cpu")
    sources = Sources(str(tiny), "", "", {}, runtime)  # type: ignore[arg-type]
    with opened("torch", sources) as model:
        assert model.config._attn_implementation == "sdpa"
        assert model.dtype == torch.float32
