"""The profile: nothing counted twice, nothing left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from accel.stages import profile
from tests.conftest import Build


def _event(name: str, ts: int, dur: int, operator: str = "", provider: str = "CPUExecutionProvider") -> dict[str, Any]:
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


def test_subgraphs_are_not_counted_twice() -> None:
    """An If's own time excludes what runs inside it, at any depth, in whatever order the events come."""
    found = list(profile.calls(reversed(TRACE), skipped_runs=1))
    own = {call.node: round(1e6 * call.own) for call in found}
    assert own == {"product": 30, "choose": 15, "inner": 20, "deeper": 10, "deepest": 5, "copy": 4}
    assert sum(own.values()) == 30 + 50 + 4


def test_digest() -> None:
    warm = list(profile.calls(TRACE, skipped_runs=0))
    assert len(warm) == 7
    found = profile.digest({"decoder": warm, "encoder": list(profile.calls(TRACE, skipped_runs=1))})
    assert found.operators["MatMul"].calls == 5
    assert found.operators["MatMul"].nodes == 4  # two a session
    assert found.copies == {"MemcpyToHost": 2, "MemcpyFromHost": 0}
    assert found.placement["CUDAExecutionProvider"] == {"MemcpyToHost": 2}
    assert found.seconds == pytest.approx(178e-6)
    assert found.share == pytest.approx((10 + 35 + 35) / 178)
    assert next(iter(found.operators)) == "MatMul"


def test_profile_of_a_deployable(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operators' times sum to the whole, every node ran on the CPU, nothing was copied, and the calls are as many."""
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
    events = json.loads((folder / "decoder.trace.json").read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    assert len(runs) == profile.WARM_UP + 5
    measured = sum(event["dur"] for event in runs[profile.WARM_UP :])
    decoder = sum(call.own for call in profile.calls(events, profile.WARM_UP))
    assert 0 < 1e6 * decoder <= measured
    assert (folder / profile.PLOT).read_bytes().startswith(b"\x89PNG")
    drawn = profile.rows(summary)
    assert len(drawn) == 4
    assert [float(row[1]) for row in drawn] == sorted((float(row[1]) for row in drawn), reverse=True)
    profile.show(summary)
    assert "copies between host and device: 0 Memcpy" in capsys.readouterr().out
