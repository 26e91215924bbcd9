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
from accel.config.schema import BenchmarkConfig


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
            return Timing(1.0, latencies=[0.1] * options["max_new_tokens"])

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
    generations = 2 * (latency.REPEATS + BenchmarkConfig().warmup)  # of all tokens, and of one
    assert events == [
        *("begin torch", *["torch_cache"] * generations, "end torch"),
        *("begin merged", *["onnx_merged"] * generations, "end merged"),
    ]
