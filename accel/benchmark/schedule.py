"""The setups of a benchmark take turns: how often each generates, and when it has had enough."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from accel import progress
from accel.benchmark.backends import BACKENDS, TORCH, Sources, free
from accel.benchmark.timer import Timing
from accel.benchmark.worker import BackendWorker
from accel.config.schema import BenchmarkConfig
from accel.errors import AccelError

LONG = 10.0  # seconds: a generation that is worth a line of its own, should the run be cut short


@dataclass
class ScheduleResult:
    """Setup -> its timings, one a repeat; and what PyTorch's FP16 model holds in FP32."""

    timings: dict[str, list[Timing]]
    fp32: dict[str, int]


def time_backends(
    names: Sequence[str], sources: Sources, given: Mapping[str, Tensor], benchmark: BenchmarkConfig
) -> ScheduleResult:
    """Time `names` on inputs `given` [batch, source]. All engines are open at once, each in a process of its own."""
    engines = dict.fromkeys(BACKENDS[name].engine for name in names)
    free(sources.runtime.device)  # what this process holds would take room from those that measure
    with ExitStack() as stack:
        processes = {engine: stack.enter_context(BackendWorker(engine, sources)) for engine in engines}
        for process in processes.values():
            process.open(given)

        def generate(name: str, new_tokens: int) -> Timing:
            backend = BACKENDS[name]
            timing = processes[backend.engine].generate(name, backend.options(new_tokens, benchmark.num_beams))
            if len(timing.latencies) != new_tokens:
                raise AccelError(f"{name} generated {len(timing.latencies)} tokens instead of {new_tokens}")
            return timing

        fp32 = processes[TORCH].kept_in_fp32() if TORCH in processes else {}
        return ScheduleResult(run_interleaved(names, benchmark, generate), fp32)


def run_interleaved(
    names: Sequence[str], benchmark: BenchmarkConfig, generate: Callable[[str, int], Timing]
) -> dict[str, list[Timing]]:
    """Setup -> its timings. They take turns, so that a slow minute hits all of them.

    A setup whose measured generations together took more than `patience` seconds gets no further one; each gets at
    least one. Warm-ups are not measured. `generate` takes a setup's name and the number of new tokens.
    """
    found: dict[str, list[Timing]] = {name: [] for name in names}
    turns = [(number, name) for number in range(benchmark.warmup + benchmark.repeats) for name in names]
    for number, name in progress.track(turns, "generating"):
        if number < benchmark.warmup:
            generate(name, warmup_tokens(name, benchmark))
        elif benchmark.time_budget_s is None or sum(timing.total for timing in found[name]) <= benchmark.time_budget_s:
            timing = generate(name, benchmark.new_tokens)
            found[name].append(timing)
            if timing.total > LONG:
                progress.note(f"{name}: {timing.total:.1f} s")
    return found


def warmup_tokens(name: str, benchmark: BenchmarkConfig) -> int:
    """New tokens of a warm-up: few, unless the setup makes something ready, which depends on their number."""
    if benchmark.warmup_tokens is None or BACKENDS[name].prepares(benchmark.num_beams):
        return benchmark.new_tokens
    return min(benchmark.warmup_tokens, benchmark.new_tokens)
