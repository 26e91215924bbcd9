"""Profile: every node is counted once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import accel
from accel.benchmark.backends import open_profiled
from accel.cli import profile_table
from accel.cli.compose import compose, execute
from accel.config.presets import runtime_preset
from accel.stages import profile
from tests.conftest import Build, overrides_for


def _event(name: str, ts: int, dur: int, operator: str = "", provider: str = "CPUExecutionProvider") -> dict[str, Any]:
    """Return an event of ONNX Runtime's trace, of a node or, without `operator`, of the session."""
    if not operator:
        return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}}
    arguments = {"op_name": operator, "provider": provider}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "tid": 1, "args": arguments}


TRACE = [
    _event("session_initialization", 0, 50),
    _event("model_run", 100, 20),
    _event("product", 101, 10, "MatMul"),  # warm-up
    _event("model_run", 200, 100),
    _event("product", 201, 30, "MatMul"),
    _event("choose", 240, 50, "If"),
    _event("inner", 245, 20, "Add"),
    _event("deeper", 270, 15, "If"),
    _event("deepest", 272, 5, "MatMul"),
    _event("copy", 292, 4, "MemcpyToHost", "CUDAExecutionProvider"),
    _event("SequentialExecutor::Execute", 200, 99),
]


def test_time_of_subgraphs() -> None:
    """An If's own time excludes the nodes of its branches, at any depth and for any order of events."""
    found = list(profile.calls(reversed(TRACE), skipped_runs=1))
    own = {call.node: round(1e6 * call.own) for call in found}
    assert own == {"product": 30, "choose": 15, "inner": 20, "deeper": 10, "deepest": 5, "copy": 4}
    assert sum(own.values()) == 30 + 50 + 4


def test_digest() -> None:
    warm = list(profile.calls(TRACE, skipped_runs=0))
    assert len(warm) == 7
    found = profile.digest({"decoder": warm, "encoder": list(profile.calls(TRACE, skipped_runs=1))})
    assert found.operators["MatMul"].calls == 5
    assert found.operators["MatMul"].nodes == 4  # two per session
    assert found.copies == {"MemcpyToHost": 2, "MemcpyFromHost": 0}
    assert found.placement["CUDAExecutionProvider"] == {"MemcpyToHost": 2}
    assert found.seconds == pytest.approx(178e-6)
    assert found.share == pytest.approx((10 + 35 + 35) / 178)
    assert next(iter(found.operators)) == "MatMul"


def test_nodes_off_the_device() -> None:
    """Nodes on the CPU and copies in the decoder are listed for prefill and decode steps, most calls first."""
    cpu, gpu = "CPUExecutionProvider", "CUDAExecutionProvider"
    trace = [_event("warm up", 0, 1, "Shape", cpu)]
    for run in range(4):  # a warm-up, prefill, two decode steps
        begin = 100 * run
        trace += [
            _event("model_run", begin, 90),
            _event("branch", begin + 1, 80, "If", gpu),
            _event("length", begin + 2, 1, "Shape", cpu),
            _event("product", begin + 4, 5, "MatMul", gpu),
        ]
        if run == 1:
            trace.append(_event("first", begin + 10, 1, "MemcpyToHost", gpu))
        if run > 1:
            trace.append(_event("twice", begin + 10, 1, "Gather", cpu))
            trace.append(_event("twice", begin + 12, 1, "Gather", cpu))
        if run == 3:
            trace.append(_event("last", begin + 14, 1, "MemcpyFromHost", gpu))
    decoder = list(profile.calls(trace, skipped_runs=1))
    assert [call.run for call in decoder if call.node == "product"] == [0, 1, 2]
    encoder = list(profile.calls([_event("model_run", 0, 9), _event("mask", 1, 2, "Cast", cpu)], 0))
    found = profile.digest({"decoder": decoder, "encoder": encoder}).off_device
    assert found == {
        "prefill": [profile.Node("length", "Shape", cpu, 1.0), profile.Node("first", "MemcpyToHost", gpu, 1.0)],
        "decode": [
            profile.Node("twice", "Gather", cpu, 2.0),
            profile.Node("length", "Shape", cpu, 1.0),
            profile.Node("last", "MemcpyFromHost", gpu, 0.5),
        ],
    }
    assert profile_table.off_device_lines("decode", [asdict(node) for node in found["decode"]]) == [
        "decoder, decode: 2 nodes on the CPU, 3.0 calls per token: twice (Gather), length (Shape)",
        "decoder, decode: 0 nodes MemcpyToHost, 0.0 calls per token",
        "decoder, decode: 1 nodes MemcpyFromHost, 0.5 calls per token: last (MemcpyFromHost)",
    ]


def test_cpu_profile_has_no_nodes_off_the_device() -> None:
    assert profile.digest({"decoder": list(profile.calls(TRACE[:6], skipped_runs=1))}).off_device is None


def test_description_on_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    """The printed profile notes that times on CUDA are the host's."""
    point = {"new_tokens": 2, "source_length": 3, "top": 4}
    summary = {"point": point, "device": "a GPU", "seconds": 0.5, "share": 0.5, "operators": {}, "providers": {}}
    summary |= {"copies": {}, "off_device": {"prefill": [], "decode": []}}
    profile_table.show(summary)
    printed = capsys.readouterr().out
    assert "launching kernels (not the device's time)" in printed
    assert "decoder, decode: 0 nodes on the CPU" in printed


def test_profile_of_a_deployable(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times and calls of the operators add up to the totals, every node ran on the CPU, and nothing was copied."""
    _, artifacts = build(tiny, "profile", ["profile.new_tokens=5", "profile.source_length=6", "profile.top=4"])
    folder, summary = artifacts["profile"].folder, artifacts["profile"].summary
    assert json.loads((folder / profile.PROFILE).read_text()) == summary
    operators = summary["operators"].values()
    assert sum(usage["seconds"] for usage in operators) == pytest.approx(summary["seconds"])
    assert list(summary["providers"]) == ["CPUExecutionProvider"]
    for key in ("nodes", "calls"):
        assert summary["providers"]["CPUExecutionProvider"][key] == sum(usage[key] for usage in operators)
    assert summary["copies"] == {"MemcpyToHost": 0, "MemcpyFromHost": 0}
    assert 0 < summary["share"] < 1
    assert "off_device" not in summary
    events = json.loads((folder / "decoder.trace.json").read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    assert len(runs) == profile.WARM_UP + 5
    measured = sum(event["dur"] for event in runs[profile.WARM_UP :])
    decoder = sum(call.own for call in profile.calls(events, profile.WARM_UP))
    assert 0 < 1e6 * decoder <= measured
    assert (folder / profile.PLOT).read_bytes().startswith(b"\x89PNG")
    drawn = profile_table.rows(summary)
    assert len(drawn) == 4
    assert [float(row[1]) for row in drawn] == sorted((float(row[1]) for row in drawn), reverse=True)
    profile_table.show(summary)
    assert "copies between host and device: 0 Memcpy" in capsys.readouterr().out


@pytest.mark.gpu
def test_profile_on_cuda(tiny: Path, shared: Path) -> None:
    """The decoder runs on the GPU, and its nodes that don't are listed."""
    point = ("stage=profile", "profile.new_tokens=5", "profile.source_length=6", "precision=fp32", "runtime=cuda")
    overrides = overrides_for(tiny, shared / "artifacts", *point)
    summary = execute(compose([item for item in overrides if item != "runtime=cpu"]))["profile"].summary
    assert summary["device"] == torch.cuda.get_device_name()
    assert summary["providers"]["CUDAExecutionProvider"]["calls"] > 0
    assert set(summary["off_device"]) == {"prefill", "decode"}
    copies = sum(
        node["calls"] * runs
        for path, runs in (("prefill", 1), ("decode", 4))
        for node in summary["off_device"][path]
        if node["operator"] in profile.COPIES
    )
    assert copies <= sum(summary["copies"].values())  # the encoder may copy too


def test_prompts_are_profiled_as_they_run(deployable: Path, tmp_path: Path) -> None:
    """In the chunks of the model that `accel.load` opens."""
    model, _ = open_profiled(deployable, runtime_preset("cpu"), tmp_path)
    with accel.load(deployable, "cpu") as loaded:
        runtimes: list[Any] = [model.runtime, loaded.runtime]
    assert runtimes[0].prefill_chunk == runtimes[1].prefill_chunk > 0
