"""The choice between precisions: the fastest within the limits, and what is said about the others."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from accel.errors import AccelError
from accel.models.loading import load, verification_of
from accel.runtime import layout
from accel.stages import choice
from tests.conftest import Build

SLOW_FP32 = {"fp32": [2.0, 2.2, 9.0], "int8": [1.0, 1.1, 1.0]}


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"fp32": [2.0, 2.0], "int8": [1.0, 1.0], "int4": [1.5, 1.5]}, "int8"),
        ({"fp32": [1.05, 1.05], "int8": [1.0, 1.0]}, "fp32"),  # as good as equal: the one without any loss
        ({"int8": [1.0, 1.0, 30.0], "int4": [1.3, 1.3, 1.3]}, "int8"),  # one slow round
    ],
)
def test_fastest(seconds: dict[str, Sequence[float]], chosen: str) -> None:
    """By the median; of equally fast ones the first."""
    assert choice.fastest(seconds) == chosen


def overrides(*more: str) -> list[str]:
    """Overrides for a model of random weights, whose tokens any rounding changes."""
    return ["precision=auto-lowbit", "audit.trials=0", "verify.latency=false", *more]


@pytest.mark.slow
def test_fastest_within_the_limits_ships(
    build: Build, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its files, the choice in manifest and certificate; a second run neither builds nor times."""
    monkeypatch.setattr(choice, "_time_in_turn", lambda *given: SLOW_FP32)
    given = overrides("verify.min_token_agreement=0", "precision.candidates=[fp32,int8]", f"output={tmp_path / 'out'}")
    artifact = build(tiny, "verify", given)[1]["verify"]
    assert [files.dtype for files in layout.variants(artifact.folder)] == ["int8"]
    verification = verification_of(artifact.folder)
    assert verification is not None
    assert (verification["passed"], verification["precision"]) == (True, "int8")
    records = artifact.summary["choice"]
    assert [(each["precision"], each["chosen"], each["reason"]) for each in records] == [
        ("fp32", False, "not faster than int8"),
        ("int8", True, ""),
    ]
    assert records[0]["seconds"]["median"] == 2.2
    for folder in (artifact.folder, tmp_path / "out"):
        files = layout.first_variant(folder)
        assert json.loads(files.certificate.read_text())["choice"] == records
        assert "not faster than int8" in files.certificate_page.read_text()
        with load(folder) as model:
            assert model.runtime is not None
    monkeypatch.setattr(choice, "_attempt", None)
    assert build(tiny, "verify", given)[1]["verify"].folder == artifact.folder


@pytest.mark.slow
def test_precision_outside_the_limits_is_rejected(build: Build, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However fast it is. Where none is left, the message has the reason of each."""
    given = overrides("audit.trials=0", "precision.max_divergence=1e-6", "verify.num_beams=2")
    artifact = build(tiny, "verify", [*given, "precision.candidates=[int4,fp32]"])[1]["verify"]
    rejected, chosen = artifact.summary["choice"]
    assert (chosen["precision"], chosen["chosen"], rejected["seconds"]) == ("fp32", True, None)
    assert "allowed precision.max_divergence=1e-06" in rejected["reason"]
    assert len(json.loads(layout.first_variant(artifact.folder).certificate.read_text())["choice"]) == 2
    with pytest.raises(AccelError, match=r"no candidate passed\nint4: the next token's distribution diverges"):
        build(tiny, "verify", [*given, "precision.candidates=[int4]"])
