"""Estimate of time, memory and disk, and the warning before a build that doesn't fit on the disk."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from accel.cli.compose import compose
from accel.errors import AccelError
from accel.pipeline.estimate import (
    BASE_MEMORY,
    REFUSED,
    SECONDS_AT_ANY_SIZE,
    SECONDS_PER_TRACE,
    WEIGHTS_IN_MEMORY,
    Estimate,
    Size,
    announce,
)
from tests.conftest import overrides_for

LLAMA = Size(parameters=1_000_000_000, modules=200)
ALL = ("checkpoint", "prompts", "export", "optimize", "convert", "merge", "reference", "torch_error", "verify")
BUILD = ("export", "optimize", "convert", "merge", "verify")


def test_size_counts_shared_weights_once() -> None:
    """A tied embedding counts once."""
    sizes = {"vocab_size": 100, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    size = Size.of(AutoConfig.for_model("gpt2", **sizes))
    assert size is not None
    layer = 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 4 * 8
    assert size.parameters == 100 * 8 + 16 * 8 + layer + 2 * 8


def test_numbers() -> None:
    """Five copies of the weights stay on disk, three of them smaller in 16 bits; stages that don't run take none."""
    full, half = (Estimate.of(LLAMA, BUILD, half=half) for half in (False, True))
    assert full.disk == 5 * 4e9
    assert half.disk == 3.5 * 4e9
    assert full.memory == BASE_MEMORY + WEIGHTS_IN_MEMORY * 4e9
    assert Estimate.of(LLAMA, ["verify"], half=False).disk == 4e9
    assert Estimate.of(LLAMA, [*BUILD, "calibrate", "audit"], half=True).seconds > half.seconds
    assert "20.0 GB of disk" in str(full)


def test_seconds_at_any_size() -> None:
    """Imports and traces take their time however small the model is, and beside an encoder there is one trace more."""
    one, two = (Estimate.of(Size(1000, 10, traces), ALL, half=False).seconds for traces in (1, 2))
    assert two - one == pytest.approx(SECONDS_PER_TRACE)
    assert 20 < one < 30
    assert Estimate.of(Size(1000, 10), ["convert"], half=False).seconds == pytest.approx(SECONDS_AT_ANY_SIZE, abs=0.1)


@pytest.mark.parametrize(
    ("size", "measured"), [(Size(134_515_008, 304), 99), (Size(60_506_624, 190, traces=2), 58)], ids=["SmolLM2", "T5"]
)
def test_seconds_near_those_measured(size: Size, measured: float) -> None:
    """Within a sixth of whole runs on two quiet cores: see docs/benchmarks/pipeline.md."""
    assert Estimate.of(size, ALL, half=False).seconds == pytest.approx(measured, rel=1 / 6)


@pytest.mark.parametrize("share", [0.4, 0.9, 1.1])
def test_disk_that_is_too_small(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    """A build is refused with less than half of the space, and begins with a warning below all of it."""
    config = compose(overrides_for(tiny, tmp_path / "missing"))
    description = AutoConfig.from_pretrained(tiny)
    size = Size.of(description)
    assert size is not None
    needed = Estimate.of(size, BUILD, half=False).disk
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=share * needed))
    with caplog.at_level(logging.WARNING, "accel"):
        if share < REFUSED:
            with pytest.raises(AccelError, match="of disk, but only"):
                announce(config, description, BUILD)
        else:
            announce(config, description, BUILD)
        assert ("of disk, but only" in caplog.text) == (share == 0.9)
        caplog.clear()
        announce(config, description, ())  # nothing will run
        assert not caplog.text
