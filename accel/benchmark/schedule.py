"""Interleaved schedule of a benchmark: backends generate in turn until their repeats or their time budget run out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from accel import progress
from accel.benchmark.backends import BACKENDS, PYTORCH, Sources, release_memory
from accel.benchmark.timer import Timing
from accel.benchmark.worker import ModelWorker
from accel.config.schema import BenchmarkConfig
from accel.errors import AccelError

REPORT_ABOVE = 10.0  # seconds: longer generations are reported one by one, in case the run is cut short


@dataclass
class ScheduleResult:
    """Measured generations of all backends.

    Attributes:
        timings: Backend -> one timing per repeat.
        first_tokens: The same for generations of one token.
        fp32: Modules that PyTorch's FP16 model keeps in FP32: see `backends.kept_in_fp32`.
        peaks: Model -> bytes that loading it and one generation of the first backend that uses it add at the peak; see
            `footprint.AddedMemory`. Only loading counts where no first generation was asked for.
    """

    timings: dict[str, list[Timing]]
    first_tokens: dict[str, list[Timing]]
    fp32: dict[str, int]
    peaks: dict[str, int] = field(default_factory=dict)


def time_backends(
    names: Sequence[str],
    sources: Sources,
    inputs: Mapping[str, Tensor],
    benchmark: BenchmarkConfig,
    *,
    generate_first: bool = False,
) -> ScheduleResult:
    """Time backends on the same inputs. All models stay loaded, each in a worker process of its own.

    Args:
        names: The backends.
        sources: Files and settings of the benchmark.
        inputs: Inputs of `generate`, [batch, source], on the CPU.
        benchmark: Number of new tokens, beams, warm-ups and repeats.
        generate_first: Generate all new tokens once before the others load, for `ScheduleResult.peaks`.

    Raises:
        AccelError: A backend generated another number of tokens than asked for, or a worker process failed.
    """
    models: dict[str, str] = {}  # model -> the first backend that uses it
    for name in names:
        models.setdefault(BACKENDS[name].model, name)
    release_memory(sources.runtime.device)  # leave this process's unused memory to the workers
    with ExitStack() as stack:
        workers = {model: stack.enter_context(ModelWorker(model, sources)) for model in models}
        peaks = {}
        for model, worker in workers.items():
            options = BACKENDS[models[model]].options(benchmark.new_tokens, benchmark.num_beams)
            peaks[model] = worker.open(inputs, (models[model], options) if generate_first else None)

        def generate(name: str, new_tokens: int) -> Timing:
            backend = BACKENDS[name]
            timing = workers[backend.model].generate(name, backend.options(new_tokens, benchmark.num_beams))
            if len(timing.latencies) != new_tokens:
                raise AccelError(f"{name} generated {len(timing.latencies)} tokens instead of {new_tokens}")
            return timing

        half = next((workers[model] for model in PYTORCH if model in workers), None)
        fp32 = {} if half is None else half.kept_in_fp32()
        timings = run_interleaved(names, benchmark, generate)
        return ScheduleResult(timings[benchmark.new_tokens], timings[1], fp32, peaks)


def run_interleaved(
    names: Sequence[str], benchmark: BenchmarkConfig, generate: Callable[[str, int], Timing]
) -> dict[int, dict[str, list[Timing]]]:
    """Let backends generate in turn, so that a slow minute of the machine affects all of them.

    In each repeat, a backend generates all new tokens, then one. Once its measured generations of one of these lengths
    together took more than `benchmark.time_budget_s`, it gets no further one of this length; each gets at least one.
    Warm-ups are not measured.

    Args:
        names: The backends.
        benchmark: Number of new tokens, warm-ups and repeats, and the time budget.
        generate: Takes a backend's name and a number of new tokens, and times one generation.

    Returns:
        Number of new tokens, `benchmark.new_tokens` or 1 -> backend -> one timing per repeat.
    """
    lengths = sorted({benchmark.new_tokens, 1}, reverse=True)  # the longest first: its warm-up compiles and captures
    timings: dict[int, dict[str, list[Timing]]] = {length: {name: [] for name in names} for length in lengths}
    rounds = benchmark.warmup + benchmark.repeats
    schedule = [(number, name, length) for number in range(rounds) for name in names for length in lengths]
    for number, name, length in progress.track(schedule, "generating"):
        if number < benchmark.warmup:
            generate(name, min(length, warmup_tokens(name, benchmark)))
            continue
        repeats = timings[length][name]
        spent = sum(timing.total for timing in repeats)
        if benchmark.time_budget_s is not None and spent > benchmark.time_budget_s:
            continue
        timing = generate(name, length)
        repeats.append(timing)
        if timing.total > REPORT_ABOVE:
            progress.note(f"{name}, new tokens {length}: {timing.total:.1f} s")
    return timings


def warmup_tokens(name: str, benchmark: BenchmarkConfig) -> int:
    """Return the number of new tokens that a warm-up of backend `name` generates.

    It is `benchmark.warmup_tokens`, at most `benchmark.new_tokens`; or all new tokens where that is null or where the
    backend needs a warm-up of full length.
    """
    if benchmark.warmup_tokens is None or BACKENDS[name].needs_full_warmup(benchmark.num_beams):
        return benchmark.new_tokens
    return min(benchmark.warmup_tokens, benchmark.new_tokens)
