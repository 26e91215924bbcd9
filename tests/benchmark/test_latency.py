"""Latency for the certificate: which models are in memory at the same time."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accel.adapters import registry
from accel.benchmark import latency, schedule
from accel.benchmark.timer import Timing
from accel.cli.compose import compose


def test_one_model_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's process has ended when the deployable's begins; each generates as often as the other."""
    events: list[str] = []

    class Worker:
        def __init__(self, model: str, _: Any) -> None:
            self.model = model

        def open(self, *_: Any) -> int:
            return 5

        def generate(self, backend: str, options: Mapping[str, Any]) -> Timing:
            events.append(backend)
            return Timing(0.5, latencies=[0.1] * options["max_new_tokens"])

        def kept_in_fp32(self) -> dict[str, int]:
            return {}

        def __enter__(self) -> "Worker":
            events.append(f"begin {self.model}")
            return self

        def __exit__(self, *_: object) -> None:
            events.append(f"end {self.model}")

    monkeypatch.setattr(schedule, "ModelWorker", Worker)
    config = compose([f"model.checkpoint={tiny}", "model=auto", "runtime=cpu", "precision=fp32"])
    folders: Any = dict.fromkeys(("checkpoint", "convert"), SimpleNamespace(folder=tiny))
    measured = latency.compare_with_torch(tiny, config, folders, registry.build(config.architecture))
    assert measured is not None
    assert {name: figures["peak_memory"] for name, figures in measured["backends"].items()} == {
        "torch_cache": 5,
        "onnx_merged": 5,
    }
    generations = 2 * latency.REPEATS  # of all tokens, and of one; the first generation, in `open`, was the warm-up
    assert [figures["repeats"] for figures in measured["backends"].values()] == [latency.REPEATS] * 2
    assert events == [
        *("begin torch", *["torch_cache"] * generations, "end torch"),
        *("begin merged", *["onnx_merged"] * generations, "end merged"),
    ]


def test_a_slow_model_generates_less_often(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate says how many generations each figure is the median of."""
    seconds = {"torch_cache": 1.2 * latency.TIME_BUDGET_S, "onnx_merged": 0.6 * latency.TIME_BUDGET_S}

    class Worker:
        def __init__(self, *_: Any) -> None: ...

        def open(self, *_: Any) -> int:
            return 5

        def generate(self, backend: str, options: Mapping[str, Any]) -> Timing:
            return Timing(seconds[backend], latencies=[0.1] * options["max_new_tokens"])

        def kept_in_fp32(self) -> dict[str, int]:
            return {}

        def __enter__(self) -> "Worker":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(schedule, "ModelWorker", Worker)
    config = compose([f"model.checkpoint={tiny}", "model=auto", "runtime=cpu", "precision=fp32"])
    folders: Any = dict.fromkeys(("checkpoint", "convert"), SimpleNamespace(folder=tiny))
    measured = latency.compare_with_torch(tiny, config, folders, registry.build(config.architecture))
    assert measured is not None
    repeats = {name: figures["repeats"] for name, figures in measured["backends"].items()}
    assert repeats == {"torch_cache": 1, "onnx_merged": 2}
    assert measured["ratio"] == pytest.approx(2.0)
