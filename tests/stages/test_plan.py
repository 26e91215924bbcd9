"""The stage that plans the decode step."""

import json
from pathlib import Path

import pytest

from accel.cli import plan_table
from accel.errors import AccelError
from tests.conftest import Build


def test_the_graph_must_be_made(build: Build, tiny: Path) -> None:
    """It is refused before anything runs."""
    with pytest.raises(AccelError, match=r"convert.static_decode=false leaves out: set convert.static_decode=true"):
        build(tiny, "plan")


def test_plan_of_a_model(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["convert.static_decode=true", "plan.batch_size=2", "plan.cache_length=16"]
    _, artifacts = build(tiny, "plan", overrides)
    summary = artifacts["plan"].summary
    assert json.loads((artifacts["plan"].folder / "plan.json").read_text()) == summary
    assert summary["fused_share"] == 1
    assert summary["torch_softmaxes"] == 0
    assert summary["misses"] == {}
    plan_table.show(summary)
    printed = capsys.readouterr().out
    assert "one token of 2 rows, caches of 16" in printed
    assert "cross attention" in printed
    words = "4 heads of 16 over 4, 1 bias, new key and value written"
    assert [row[1] for row in plan_table.rows(summary) if row[0] == "attention"] == [words] * 2
    last = plan_table.rows(summary)[-1]
    assert last == ["choice", "best id, or a draw of those that filters leave; rows that end", "B x 1", "torch", "", ""]
