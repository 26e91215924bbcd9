"""Results of the stage `benchmark`: complete, consistent, and of the requested workload."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, T5ForConditionalGeneration

from accel.adapters import registry
from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, Sources, select_backends, torch_model
from accel.benchmark.schedule import ScheduleResult
from accel.benchmark.timer import Timing
from accel.cli import benchmark_table, console
from accel.cli.compose import compose, execute
from accel.config.schema import BenchmarkConfig, Config, RuntimeConfig
from accel.errors import AccelError
from accel.stages import benchmark
from accel.system.environment import command
from tests.conftest import Build, overrides_for

POINT = ["benchmark.source_length=5", "benchmark.new_tokens=6", "benchmark.repeats=3", "benchmark.warmup=1"]
QUICK = [*POINT, "benchmark.memory=false"]
PNG = b"\x89PNG"
COMPILED = "torch_static_compiled"


def test_figures(build: Build, tiny: Path) -> None:
    """All CPU backends have one latency per token, the same tokens, and ratios that follow from the totals."""
    _, artifacts = build(tiny, "benchmark", [*QUICK, "benchmark.num_beams=2", "benchmark.batch_size=3"])
    artifact = artifacts["benchmark"]
    summary = artifact.summary
    measured = json.loads((artifact.folder / benchmark.MEASUREMENT).read_text())
    assert set(summary["backends"]) == set(measured["latencies"]) == set(select_backends([], RuntimeConfig(name="cpu")))
    assert summary["point"] | {"new_tokens": 6, "num_beams": 2, "batch_size": 3} == summary["point"]
    assert set(summary["machine"]) >= {"device", "threads", "processor", "background_load"}
    assert summary["packages"]["torch"] == torch.__version__
    assert summary["torch_fp32"] == {}
    assert "command" in summary
    roofline = summary["roofline"]
    assert roofline["measured"] == "read"
    assert roofline["seconds"] == pytest.approx(roofline["bytes"] / roofline["bandwidth"])
    decoder = T5ForConditionalGeneration.from_pretrained(tiny).decoder
    weights = 4 * sum(parameter.numel() for parameter in decoder.parameters())
    assert 0.5 * weights < roofline["bytes"] < 1.5 * weights  # with caches, without the encoder's projections
    totals = {name: values["total"]["median"] for name, values in summary["backends"].items()}
    for name, values in summary["backends"].items():
        assert values["same_tokens"]
        assert 0 < values["total"]["min"] <= totals[name] <= values["total"]["max"]
        assert 0 < values["inside"]["median"] < totals[name]
        assert values["repeats"] == 3
        assert values["last_over_first"] == benchmark.last_over_first(measured["latencies"][name])
        assert not values["compiled"]
        first, later = values["time_to_first_token_ms"], values["time_per_output_token_ms"]
        assert 0 < first["min"] <= first["median"] <= first["max"]
        assert later["min"] <= later["median"] <= later["max"]
        assert first["median"] + 5 * later["median"] == pytest.approx(1000 * totals[name])
        singles = measured["first_token_repeats"][name]
        assert statistics.median(1000 * single["total"] for single in singles) == pytest.approx(first["median"])
        assert [(len(single["latencies"]), len(single["tokens"][0])) for single in singles] == [(1, 2)] * 3
        assert values["vs_torch_cache"] == pytest.approx(totals["torch_cache"] / totals[name])
        limit = summary["roofline"]["seconds"]
        assert values["over_roofline"] == pytest.approx(totals[name] / 6 / limit)
        share = 1000 * limit / later["median"] if later["median"] > 0 else None  # not measured in a disturbed run
        assert values["bandwidth_utilization"] == (None if share is None else pytest.approx(share))
        assert values["vs_two_files"] == pytest.approx(totals["onnx_two_files"] / totals[name])
        repeats = measured["repeats"][name]
        assert len(repeats) == 3
        assert statistics.median(repeat["total"] for repeat in repeats) == totals[name]
        for repeat in repeats:
            assert len(repeat["latencies"]) == 6
            assert sum(repeat["latencies"]) <= repeat["total"]
            assert [len(ids) for ids in repeat["tokens"]] == [1 + 6] * 3  # the decoder's start token, and no less
    for plot in benchmark.PLOTS:
        assert (artifact.folder / plot).read_bytes().startswith(PNG)


@pytest.mark.slow
def test_memory(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each process reports the memory it added; the merged decoder is compared with the decode graph alone."""
    selection = "benchmark.backends=[onnx_merged,onnx_two_files]"
    _, artifacts = build(tiny, "benchmark", [*POINT, selection])
    summary = artifacts["benchmark"].summary
    memory = summary["memory"]
    assert set(memory) == {"onnx_merged", "onnx_two_files", footprint.DECODE_ALONE}
    for name in ("onnx_merged", "onnx_two_files"):
        assert memory[name][footprint.PEAK] > 0
        assert memory[name][footprint.AT_THE_END] >= memory[name][footprint.SESSION] > 0
    alone = memory[footprint.DECODE_ALONE]
    assert summary["session_ratios"] == pytest.approx(
        {when: memory["onnx_merged"][when] / alone[when] for when in alone}
    )
    assert all(
        values["vs_torch_cache"] is None for values in summary["backends"].values()
    )  # `torch_cache` was not measured
    drawn = benchmark_table.rows(summary)
    assert [row[0] for row in drawn] == ["onnx_merged", "onnx_two_files"]
    assert {len(row) for row in drawn} == {len(benchmark_table.COLUMNS)}
    drawn = benchmark_table.memory_rows(summary)
    assert [row[0] for row in drawn] == ["onnx_merged", "onnx_two_files", footprint.DECODE_ALONE]
    assert {len(row) for row in drawn} == {len(benchmark_table.MEMORY_COLUMNS)}
    assert drawn[2][1:] == [
        benchmark_table.ABSENT,
        *(f"{alone[when] / 1e6:.0f}" for when in ("session", "at the end")),
    ]
    benchmark_table.show(summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "decode graph alone: {session:.2f}x, {at the end:.2f}x after 6 tokens".format(**summary["session_ratios"])
        in printed
    )


def test_error_in_a_process_names_the_backend(build: Build, tiny: Path) -> None:
    config, artifacts = build(tiny, "merge")
    sources = Sources(str(tiny), str(artifacts["merge"].folder), "nowhere", {}, config.runtime)
    task = footprint.Task(footprint.SESSION, footprint.DECODE_ALONE, sources.dump(), 1, 4, "", {"num_beams": 1})
    with pytest.raises(AccelError, match=r"'decode alone' failed.*decode\.onnx"):
        footprint.measure_all([task], weight_bytes=0)


@pytest.mark.slow
def test_an_unverified_bundle_is_measured_as_it_would_be_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody verified an engine that `auto` could take: it is the first that `verify` tries, if asked for no other."""
    config = Config()
    config.precision.dtype, config.runtime.static, config.runtime.engine = "float16", True, "auto"
    config.benchmark.unverified = True
    monkeypatch.setattr("accel.engine.kernel.launch.unsupported", lambda device: None)
    assert benchmark._measured_runtime(config).engine == "fused"
    config.runtime.engine = "onnxruntime"
    assert benchmark._measured_runtime(config) is config.runtime
    config.runtime.engine, config.benchmark.unverified = "auto", False
    assert benchmark._measured_runtime(config) is config.runtime


def test_unverified_bundle_only_on_request(build: Build, tiny: Path) -> None:
    """The verified deployable is measured, unless `benchmark.unverified=true`."""
    few = [*QUICK, "benchmark.backends=[onnx_merged]", "benchmark.repeats=1", "benchmark.warmup=0"]
    _, verified = build(tiny, "benchmark", few)
    _, bundle = build(tiny, "benchmark", [*few, "benchmark.unverified=true"])
    assert "verify" in verified["benchmark"].manifest.upstream
    assert "merge" not in verified["benchmark"].manifest.upstream
    assert "merge" in bundle["benchmark"].manifest.upstream
    assert "verify" not in bundle["benchmark"].manifest.upstream


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backends": ["torch_cache", "tensorrt"]}, r"'tensorrt'.*onnx_two_files.*torch_cache"),
        ({"backends": ["torch_cache", "torch_cache"]}, "twice"),
        ({"backends": [COMPILED]}, r"'torch_static_compiled' needs runtime=cuda.*torch_compiled_max, onnx"),
    ],
)
def test_invalid_backends(values: dict[str, Any], message: str) -> None:
    """Messages name the invalid value; for an unknown backend, or one of another device, also the choices."""
    with pytest.raises(AccelError, match=message):
        benchmark.check(BenchmarkConfig(**values), RuntimeConfig(name="cpu"))


def test_last_over_first() -> None:
    """The ratio ignores the first token and outliers."""
    growing = [1000.0, *(1.0 + index / 100 for index in range(100))]
    assert benchmark.last_over_first(growing) == pytest.approx(1.945 / 1.045)
    assert benchmark.last_over_first([9.0, 2.0, 3.0, 6.0]) == 3.0
    assert benchmark.last_over_first([9.0, 2.0]) is None


def test_rows() -> None:
    """A row has a remark if its tokens differ, and if one that should compile didn't; a dash for missing figures.

    There is no time per output token with one new token, and neither of the two times in results of older versions.
    """
    point = {"new_tokens": 4, "num_beams": 4, "source_length": 4, "batch_size": 1}
    timings = {
        "torch_cache": [Timing(2.0, 1.0, [0.5] * 4, [[1, 2]])],
        COMPILED: [Timing(1.0, 0.5, [0.25] * 4, [[1, 3]])],
        "onnx_merged": [Timing(0.5, 0.4, [0.1] * 4, [[1, 2]])] * 2,
    }
    firsts = {
        "torch_cache": [Timing(0.5), Timing(0.2), Timing(1.25)],
        COMPILED: [Timing(0.04)],
        "onnx_merged": [Timing(0.0125)],
    }
    measured = ScheduleResult(timings, firsts, {})
    figures = benchmark.summarize(measured, 4)
    drawn = benchmark_table.rows({"point": point, "backends": figures, "memory": {}})
    assert drawn == [
        ["torch_cache", "1", "2.00", "500 [200-1250]", "500 [500-500]", "1.00x", "-", "-", "-"],
        [
            *(f"{COMPILED} (other tokens, not compiled)", "1", "1.00"),
            *("40.0 [40.0-40.0]", "320 [320-320]", "2.00x", "-", "-", "-"),
        ],
        ["onnx_merged", "2", "0.500", "12.5 [12.5-12.5]", "162 [162-162]", "4.00x", "-", "-", "-"],
    ]
    assert [values["engine"] for values in figures.values()] == [None, None, None]
    timings["onnx_merged"] = [Timing(0.5, 0.4, [0.1] * 4, [[1, 2]], engine="fused")]
    figures = benchmark.summarize(measured, 4)
    drawn = benchmark_table.rows({"point": point, "backends": figures, "memory": {}})
    assert figures["onnx_merged"]["engine"] == "fused"
    assert drawn[-1][0] == "onnx_merged (fused)"
    one_token = benchmark.summarize(ScheduleResult(firsts | {"onnx_merged": [Timing(0.0049)]}, firsts, {}), 1)
    drawn = benchmark_table.rows({"point": point | {"new_tokens": 1}, "backends": one_token, "memory": {}})
    assert [row[2:5] for row in drawn][::2] == [
        ["0.500", "500 [200-1250]", "-"],
        ["0.005", "12.5 [12.5-12.5]", "-"],
    ]
    old = {"backends": {"torch_cache": dict(figures["torch_cache"])}, "memory": {}}
    for key in benchmark_table.TOKEN_TIMES:
        del old["backends"]["torch_cache"][key]
    assert benchmark_table.rows(old) == [["torch_cache", "1", "2.00", "-", "-", "1.00x", "-", "-", "-"]]
    timings[COMPILED][0].compiled = True
    assert benchmark.summarize(measured, 4)[COMPILED]["compiled"]


def test_width(capsys: pytest.CaptureFixture[str]) -> None:
    """With every backend, no name or figure is wrapped where the console is 120 columns wide."""
    figure = {"median": 1234.0, "min": 1111.0, "max": 2345.0}
    figures = {name: {"repeats": 5, "total": figure, "same_tokens": True, "compiled": True} for name in BACKENDS}
    for values in figures.values():
        values |= dict.fromkeys(benchmark_table.TOKEN_TIMES, figure) | dict.fromkeys(benchmark_table.RATIOS, 123.45)
        values["bandwidth_utilization"] = 1.234
    console.table("", benchmark_table.COLUMNS, benchmark_table.rows({"backends": figures}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= console.FILE_WIDTH
    for name in BACKENDS:
        line = next(line for line in lines if f"│ {name} " in line)
        assert line.count("1234 [1111-2345]") == 2
        assert line.endswith(" 123.45x │ 123% │")


def test_every_backend_gets_its_share_of_the_bandwidth() -> None:
    """From the time of the total, and from the time per output token; None where there is no roofline, or no token."""

    def figures(each: float | None) -> dict[str, Any]:
        times = None if each is None else {"median": each, "min": each, "max": each}
        return {"total": {"median": 0.4}, "time_per_output_token_ms": times}

    backends = {name: figures(each) for name, each in {"a": 80.0, "b": 20.0, "c": None, "d": 0.0}.items()}
    benchmark.add_bandwidth(backends, {"seconds": 0.01}, 4)
    found = [[values["over_roofline"], values["bandwidth_utilization"]] for values in backends.values()]
    assert found == [[10.0, 0.125], [10.0, 0.5], [10.0, None], [10.0, None]]
    benchmark.add_bandwidth(backends, None, 4)
    assert {values[key] for values in backends.values() for key in ("over_roofline", "bandwidth_utilization")} == {None}


def test_no_roofline_where_the_graph_is_computed_in_another_dtype() -> None:
    sources = Sources("", "", "nowhere", {}, RuntimeConfig(name="cpu"), dtype="float16")
    assert benchmark.measure_roofline(sources, BenchmarkConfig()) is None


def test_the_processors_bandwidth_is_explained() -> None:
    roofline = {"seconds": 1e-2, "bytes": 1e8, "bandwidth": 1e10, "measured": "read"}
    text = benchmark_table._about_roofline(roofline)
    assert (
        "10.000 ms, the time it takes to read 100 MB of weights and caches once at 10.0 GB/s, the bandwidth at" in text
    )
    assert "TB/s, the bandwidth of a copy" in benchmark_table._about_roofline(roofline | {"measured": "copy"})


def test_command() -> None:
    """The reported command works on another machine: without this one's paths, quoted where the shell needs it."""
    arguments = [
        *("/home/a/venv/bin/accel", "-m", "+sweep=long", "artifacts=/tmp/x", "hydra.sweep.dir=/tmp/y"),
        *("model.checkpoint=/data/models/mine", "benchmark.backends=[torch_cache,onnx_merged]", "model=t5-large"),
    ]
    assert command(arguments) == (
        "python -m accel -m +sweep=long model.checkpoint=mine "
        "'benchmark.backends=[torch_cache,onnx_merged]' model=t5-large"
    )
    assert command(["/usr/bin/pytest", "-q"]) is None


def test_one_process_at_a_time_on_a_gpu() -> None:
    """The driver's memory counter sees all processes, so only one measures at a time."""

    def tasks(device: str) -> list[footprint.Task]:
        sources = {"runtime": {"device": device}}
        return [footprint.Task(footprint.PEAK, name, sources, 1, 4, "", {}) for name in ("torch_cache", "onnx_merged")]

    assert footprint.parallel_processes(tasks("cuda:0"), 0) == 1
    assert footprint.parallel_processes(tasks("cpu"), 0) == min(os.cpu_count() or 1, 2**20)
    assert footprint.parallel_processes(tasks("cpu"), 2**50) == 1


def test_inputs_are_not_padded(tiny: Path, build: Build) -> None:
    config, _ = build(tiny, "merge")
    architecture = registry.build(config.architecture)
    model_config = AutoConfig.from_pretrained(tiny)
    point = BenchmarkConfig(source_length=9, batch_size=4, seed=3)
    inputs = benchmark.random_inputs(architecture, model_config, point)
    assert inputs["input_ids"].shape == (4, 9)
    assert bool(inputs["attention_mask"].all())
    assert len(inputs["input_ids"].unique()) > 15
    again = benchmark.random_inputs(architecture, model_config, point)
    assert torch.equal(inputs["input_ids"], again["input_ids"])


def test_background_load_is_reported(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    point = {"new_tokens": 4, "num_beams": 1, "source_length": 4, "batch_size": 1}
    for share in (0.02, 0.6):
        facts = {"device": "cpu", "threads": 2, "background_load": share}
        benchmark_table.show(
            {
                "point": point,
                "precision": "float32",
                "machine": facts,
                "backends": {},
                "torch_fp32": {"wo": 48} if share == 0.6 else {},
                "memory": {},
                "session_ratios": {},
                "roofline": {"seconds": 3e-4, "bytes": 9e8, "bandwidth": 3e12} if share == 0.6 else None,
            }
        )
        printed = capsys.readouterr()
        assert ("other programs took 60%" in caplog.text) is (share == 0.6)
        assert ("0.300 ms, the time it takes to read 900 MB" in printed.out) is (share == 0.6)
        assert ("keeps in FP32: 48 x wo" in printed.out) is (share == 0.6)


def on_gpu(tiny: Path, shared: Path, *more: str, runtime: str = "cuda") -> list[str]:
    """Return overrides for the tiny T5 on CUDA, in FP16 and unverified: with random weights near ties decide."""
    overrides = overrides_for(tiny, shared / "artifacts", *more)
    return [*(item for item in overrides if item != "runtime=cpu"), f"runtime={runtime}", "benchmark.unverified=true"]


def alone_on_gpu(test: Any) -> Any:
    """Mark a test for CUDA. All run in one worker, because a GPU's memory counter sees every process."""
    return pytest.mark.gpu(pytest.mark.xdist_group("gpu")(test))


@alone_on_gpu
def test_benchmark_on_cuda(tiny: Path, shared: Path) -> None:
    """Every backend is measured, with the device memory of its process, and the machine is named."""
    overrides = on_gpu(tiny, shared, *POINT, "stage=benchmark", "benchmark.new_tokens=20", runtime="cuda-graph")
    summary = execute(compose(overrides))["benchmark"].summary
    assert set(summary["backends"]) == set(BACKENDS)
    assert summary["roofline"]["bandwidth"] > 1e11
    assert summary["backends"]["onnx_captured"]["over_roofline"] > 1
    assert summary["machine"]["device"] == torch.cuda.get_device_name()
    assert summary["machine"]["driver"]
    assert summary["torch_fp32"] == {"wo": 5}
    for name in BACKENDS:
        assert summary["memory"][name][footprint.PEAK] > 0
    for name in ("onnx_merged", footprint.DECODE_ALONE, footprint.CAPTURED):
        assert summary["memory"][name][footprint.SESSION] > 0
    assert summary["session_ratios"]["session"] > 0


@alone_on_gpu
def test_initialized_device_holds_its_context(tiny: Path) -> None:
    """Memory of CUDA's context and of cuBLAS is not counted: initializing a second time takes none."""
    device = torch.device("cuda")
    footprint.initialize_cuda(device)
    before = footprint.used_memory(device)
    footprint.initialize_cuda(device)
    assert footprint.used_memory(device) == before
    assert torch_model(Sources(str(tiny), "", "", {}, RuntimeConfig(name="cuda", device="cuda"))).device.type == "cuda"
