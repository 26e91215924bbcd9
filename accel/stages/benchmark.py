"""One point of the experiment: every setup generates the same number of tokens from the same inputs, in turn."""

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from accel import console, measure
from accel.adapter import Architecture, Role
from accel.artifacts import Artifact, versions
from accel.clock import OtherLoad, Timing, forced, time_generation
from accel.errors import AccelError, unknown
from accel.machine import machine
from accel.schema import BenchmarkConfig, Config
from accel.setups import BASELINE, OURS, SEPARATE, SETUPS, Sources, opened
from accel.stages import Stage

MEASUREMENT = "measurement.json"
PLOTS = ("latency.png", "accumulated.png")
COLUMNS = ("setup", "total s", "model s", "ms a token", "x torch +cache", "x two files", "peak MB", "session MB")
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu")
ABSENT = "-"
BUSY = 0.1  # share of the processor that others may take before the times say little


def check(benchmark: BenchmarkConfig) -> None:
    """Raises `AccelError` on a setup that doesn't exist, one named twice, or a negative number of warm-ups."""
    for name in benchmark.setups:
        if name not in SETUPS:
            raise unknown("benchmark.setups", name, SETUPS)
    if len(set(benchmark.setups)) < len(benchmark.setups):
        raise AccelError(f"benchmark.setups={benchmark.setups} names a setup twice")
    if benchmark.warmup < 0:
        raise AccelError(f"benchmark.warmup={benchmark.warmup}: must be 0 or more")


def random_inputs(
    architecture: Architecture, description: PretrainedConfig, benchmark: BenchmarkConfig
) -> dict[str, Tensor]:
    """`batch_size` rows of exactly `source_length` random ids, nothing padded."""
    generator = torch.Generator().manual_seed(benchmark.seed)
    rows = [architecture.feeds(description, 1, benchmark.source_length, generator) for _ in range(benchmark.batch_size)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def time_setups(names: Sequence[str], sources: Sources, given: Mapping[str, Tensor], benchmark: BenchmarkConfig) -> Any:
    """Setup -> its timings, one a repeat. The setups take turns, so that a slow minute hits all of them."""
    found: dict[str, list[Timing]] = {name: [] for name in names}
    inputs = {name: tensor.to(sources.runtime.device) for name, tensor in given.items()}
    with ExitStack() as stack:
        engines = dict.fromkeys(SETUPS[name].engine for name in names)
        models = {engine: stack.enter_context(opened(engine, sources)) for engine in engines}
        turns = [(number, name) for number in range(benchmark.warmup + benchmark.repeats) for name in names]
        for number, name in console.track(turns, "generating"):
            setup = SETUPS[name]
            options = forced(benchmark.new_tokens, benchmark.num_beams, use_cache=setup.use_cache)
            timing = time_generation(models[setup.engine], inputs, options)
            if len(timing.latencies) != benchmark.new_tokens:
                raise AccelError(f"{name} generated {len(timing.latencies)} tokens instead of {benchmark.new_tokens}")
            if number >= benchmark.warmup:
                found[name].append(timing)
    return found


def measure_memory(
    names: Sequence[str], sources: Sources, given: Mapping[str, Tensor], benchmark: BenchmarkConfig
) -> dict[str, dict[str, int]]:
    """Setup -> bytes: `peak` of loading and one generation, and `session`, what its decoder's sessions hold.

    `step alone` is the yardstick for the merged decoder: the step graph by itself, which can't begin a generation.
    """
    sessions = [name for name in (OURS, SEPARATE) if name in names]
    chosen = [(measure.PEAK, name) for name in names] + [(measure.SESSION, name) for name in sessions]
    if OURS in names:
        chosen.append((measure.SESSION, measure.STEP_ALONE))
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        save_file(dict(given), inputs)
        tasks = []
        for kind, name in chosen:
            cached = name not in SETUPS or SETUPS[name].use_cache
            options = forced(benchmark.new_tokens, benchmark.num_beams, use_cache=cached)
            tasks.append(
                measure.Task(
                    kind, name, sources.dump(), benchmark.batch_size, benchmark.source_length, str(inputs), options
                )
            )
        weights = sum(path.stat().st_size for path in Path(sources.graphs).iterdir())
        figures = measure.measure_all(tasks, weights)
    memory: dict[str, dict[str, int]] = {}
    for (kind, name), figure in zip(chosen, figures, strict=True):
        memory.setdefault(name, {})[kind] = figure
    return memory


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(timings: Mapping[str, Sequence[Timing]], new_tokens: int) -> dict[str, dict[str, Any]]:
    """The figures of every setup: seconds, milliseconds a token, ratios of medians within this run (more is faster)."""
    figures: dict[str, dict[str, Any]] = {}
    for name, repeats in timings.items():
        total = spread([timing.total for timing in repeats])
        figures[name] = {
            "total": total,
            "inside": spread([timing.inside for timing in repeats]),
            "ms_per_token": 1000 * total["median"] / new_tokens,
        }
    known = BASELINE if BASELINE in timings else next(iter(timings))
    for name, values in figures.items():
        for key, other in (("vs_torch_cache", BASELINE), ("vs_two_files", SEPARATE)):
            values[key] = figures[other]["total"]["median"] / values["total"]["median"] if other in figures else None
        values["same_tokens"] = all(timing.tokens == timings[known][0].tokens for timing in timings[name])
    return figures


def latencies(timings: Mapping[str, Sequence[Timing]]) -> dict[str, list[float]]:
    """Setup -> seconds a token by position, medians over the repeats."""
    return {
        name: [statistics.median(position) for position in zip(*(timing.latencies for timing in repeats), strict=True)]
        for name, repeats in timings.items()
    }


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `measurement.json`, the plot of latency by position and the plot of accumulated time."""
    benchmark = config.benchmark
    checkpoint = inputs["checkpoint"].folder
    description = AutoConfig.from_pretrained(checkpoint)
    sources = Sources(
        checkpoint=str(checkpoint),
        deployable=str(inputs[_measured(config)].folder),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(description, Role.STEP).cache,
        runtime=config.runtime,
        dtype=config.precision.dtype,
    )
    names = benchmark.setups or list(SETUPS)
    given = random_inputs(architecture, description, benchmark)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.runtime.threads or threads)
    try:
        with OtherLoad() as others:
            timings = time_setups(names, sources, given, benchmark)
        facts = machine(config) | {"torch_threads": torch.get_num_threads(), "other_load": others.share}
    finally:
        torch.set_num_threads(threads)
    memory = measure_memory(names, sources, given, benchmark) if benchmark.memory else {}
    summary = {
        "point": {key: value for key, value in asdict(benchmark).items() if key not in ("setups", "memory")},
        "precision": config.precision.dtype,
        "machine": facts,
        "packages": versions(PACKAGES),
        "setups": summarize(timings, benchmark.new_tokens),
        "memory": memory,
        "session_ratio": _session_ratio(memory),
    }
    positions = latencies(timings)
    _plot(positions, summary, out)
    raw = {name: [asdict(timing) for timing in repeats] for name, repeats in timings.items()}
    (out / MEASUREMENT).write_text(json.dumps(summary | {"latencies": positions, "repeats": raw}))
    return summary


def _measured(config: Config) -> str:
    return "merge" if config.benchmark.unverified else "verify"


def _session_ratio(memory: Mapping[str, Mapping[str, int]]) -> float | None:
    alone = memory.get(measure.STEP_ALONE, {}).get(measure.SESSION)
    return memory[OURS][measure.SESSION] / alone if alone else None


def _plot(positions: Mapping[str, Sequence[float]], summary: Mapping[str, Any], out: Path) -> None:
    from accel import plots  # imports matplotlib, which nothing else needs

    title = describe(summary)
    plots.latency(positions, title, out / PLOTS[0])
    plots.accumulated(positions, title, out / PLOTS[1])


def describe(summary: Mapping[str, Any]) -> str:
    """The point measured, in words."""
    point, facts = summary["point"], summary["machine"]
    beams = "greedy" if point["num_beams"] == 1 else f"{point['num_beams']} beams"
    return (
        f"{point['new_tokens']} new tokens, {beams}, source length {point['source_length']}, "
        f"batch size {point['batch_size']}, {summary['precision']}, {facts['device']}, {facts['threads']} threads"
    )


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row a setup, in the order of `COLUMNS`; and one for the memory of the step graph alone."""
    drawn: list[list[str]] = []
    for name in (name for name in SETUPS if name in summary["setups"]):  # a manifest keeps no order
        values = summary["setups"][name]
        total, held = values["total"], summary["memory"].get(name, {})
        drawn.append(
            [
                name if values["same_tokens"] else f"{name} (other tokens)",
                f"{_seconds(total['median'])} [{_seconds(total['min'])}-{_seconds(total['max'])}]",
                _seconds(values["inside"]["median"]),
                f"{values['ms_per_token']:.2f}",
                *(_ratio(values[key]) for key in ("vs_torch_cache", "vs_two_files")),
                *(_megabytes(held.get(kind)) for kind in (measure.PEAK, measure.SESSION)),
            ]
        )
    if (alone := summary["memory"].get(measure.STEP_ALONE)) is not None:
        blank = [ABSENT] * (len(COLUMNS) - 2)
        drawn.append([measure.STEP_ALONE, *blank, _megabytes(alone[measure.SESSION])])
    return drawn


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}x"


def _megabytes(value: int | None) -> str:
    return ABSENT if value is None else f"{value / 1e6:.0f}"


def show(summary: Mapping[str, Any]) -> None:
    """Print the table, and how much more the merged decoder's session holds than the step graph's."""
    console.table(f"Benchmark: {describe(summary)}", COLUMNS, rows(summary))
    if summary["session_ratio"] is not None:
        console.out.print(
            f"session memory of the merged decoder: {summary['session_ratio']:.2f}x that of the step graph alone"
        )
    if (others := summary["machine"]["other_load"]) > BUSY:
        console.warn(
            f"other programs took {others:.0%} of the processor during the benchmark: threads that wait by spinning, "
            "PyTorch's above all, were slowed many times over, and the ratios say little. Repeat on a quiet machine."
        )


STAGE = Stage(
    name="benchmark",
    run=run,
    inputs=lambda config: ("checkpoint", "convert", _measured(config)),
    sections=("precision", "runtime", "benchmark"),
    packages=PACKAGES,
    machine=True,
)
