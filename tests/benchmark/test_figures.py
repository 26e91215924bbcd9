"""Time to first token and time per output token: of known timings, and of models with a known pace on a fake clock."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel.benchmark.figures import token_times
from accel.benchmark.schedule import ScheduleResult, run_interleaved
from accel.benchmark.timer import Timing, fixed_length_options, time_generation
from accel.config.schema import BenchmarkConfig
from accel.stages.benchmark import summarize


def timings(*seconds: float) -> list[Timing]:
    return [Timing(total=value) for value in seconds]


def test_token_times() -> None:
    """The median time to first token is taken off every generation; an outlier among them changes nothing else."""
    figures = token_times(timings(1.07, 1.05, 1.09), timings(0.05, 0.04, 0.9), 11)
    assert figures["time_to_first_token_ms"] == pytest.approx({"median": 50, "min": 40, "max": 900})
    assert figures["time_per_output_token_ms"] == pytest.approx({"median": 102, "min": 100, "max": 104})


def test_one_token_has_no_time_per_output_token() -> None:
    generations = timings(0.05, 0.04)
    assert token_times(generations, generations, 1) == {
        "time_to_first_token_ms": pytest.approx({"median": 45, "min": 40, "max": 50}),
        "time_per_output_token_ms": None,
    }


class FakeModel:
    """Model whose calls advance a clock; each length takes longer the first time, as if it were compiled."""

    device, config = "cpu", SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, clock: SimpleNamespace, setup: float, prefill: float, step: float) -> None:
        self.clock, self.setup, self.prefill, self.step = clock, setup, prefill, step
        self.seen: set[int] = set()

    def prepare_inputs_for_generation(self) -> None:
        pass

    def _update_model_kwargs_for_generation(self) -> None:
        pass

    def generate(self, max_new_tokens: int, **_: Any) -> torch.Tensor:
        self.clock.now += self.setup if max_new_tokens in self.seen else 100.0
        self.seen.add(max_new_tokens)
        for index in range(max_new_tokens):
            self.prepare_inputs_for_generation()
            self.clock.now += self.step if index else self.prefill
            self._update_model_kwargs_for_generation()
        return torch.zeros(1, max_new_tokens)


@pytest.mark.parametrize("new_tokens", [1, 2, 50])
def test_pace_of_a_model(monkeypatch: pytest.MonkeyPatch, new_tokens: int) -> None:
    """Set-up and prefill are the time to first token; each later token takes a step; warm-ups don't count."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("accel.benchmark.timer.time", SimpleNamespace(perf_counter=lambda: clock.now))
    models: dict[str, Any] = {
        "torch_cache": FakeModel(clock, setup=0.002, prefill=0.040, step=0.003),
        "onnx_merged": FakeModel(clock, setup=0.001, prefill=0.020, step=0.0005),
    }

    def generate(name: str, length: int) -> Timing:
        return time_generation(models[name], {}, fixed_length_options(length, 1, use_cache=True))

    point = BenchmarkConfig(new_tokens=new_tokens, repeats=3, warmup=1, warmup_tokens=None)
    measured = run_interleaved(list(models), point, generate)
    figures = summarize(ScheduleResult(measured[new_tokens], measured[1], {}), new_tokens)
    for name, first, step in (("torch_cache", 42.0, 3.0), ("onnx_merged", 21.0, 0.5)):
        found = figures[name]
        assert found["time_to_first_token_ms"] == pytest.approx({"median": first, "min": first, "max": first})
        expected = None if new_tokens == 1 else pytest.approx({"median": step, "min": step, "max": step})
        assert found["time_per_output_token_ms"] == expected
        total = first + (new_tokens - 1) * step
        assert 1000 * found["total"]["median"] == pytest.approx(total)
