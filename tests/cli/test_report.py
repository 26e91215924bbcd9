"""Report that the command line prints after the stages."""

from pathlib import Path

import pytest

from accel.cli import report
from accel.config.schema import Config
from accel.pipeline.store import Artifact, Manifest


def test_precision_plan_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The report has the plan's size before and after trials, the rules, and the largest magnitudes with inputs."""
    mix = {"nodes": 0.75, "weight_bytes": 0.5, "fp32_nodes": 12, "fp32_bytes": 2_500_000, "casts": 7}
    summary = {
        "format": "float16",
        "sizes": {"by the rule": {"decode": mix}, "after trials": {"decode": mix | {"fp32_nodes": 4, "nodes": 0.9}}},
        "rules": {"decode": {"overflow": 3, "underflow": 1}, "encoder": {"overflow": 2}},
        "largest_values": [{"component": "decode", "value": "add_7", "largest": 31234.5, "seen_with": "text 3: harke"}],
    }
    report.finish(Config(), {"audit": Artifact(Path(), Manifest("audit", "key", {}, {}, {}, 0.0, 0, 0, summary, {}))})
    printed = capsys.readouterr().out
    for part in ("12 (25.0%), 7, 2.5 MB", "4 (10.0%), 7, 2.5 MB", "overflow: decode 3, encoder 2", "text 3: harke"):
        assert part in printed


def test_formats_of_weights_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The report of an audit for low bits has the formats' counts, and the trials with what they measured."""
    trial = {"weights": 181, "passed": False, "tokens": 532, "greedy_tokens": 256, "changed": 5, "error": 0.0326}
    trial |= {"clear_changes": 2, "change_bound": 0.0287}
    trial |= {"divergence": 0.00262, "standard_error": 0.00031}
    smaller = trial | {"weights": 158, "passed": True, "changed": 1, "clear_changes": 0, "change_bound": 0.0154}
    summary = {
        "weights": {"int8 block-32": 128, "float32: trials": 23},
        "trials": [trial, smaller],
    }
    report.finish(Config(), {"audit": Artifact(Path(), Manifest("audit", "key", {}, {}, {}, 0.0, 0, 0, summary, {}))})
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    for row in (["int8 block-32", "128"], ["float32: trials", "23"]):
        assert row in lines
    assert ["181", "5 of 256", "2, at most 2.9%", "0.0026 ± 0.0003 (532 tokens)", "0.033", "no"] in lines
    assert ["158", "1 of 256", "0, at most 1.5%", "0.0026 ± 0.0003 (532 tokens)", "0.033", "yes"] in lines
