"""One point of the experiment: every setup generates the same number of tokens from the same inputs, in turn, each
engine in a process of its own.
"""

import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from accel.adapters.types import Architecture, Component
from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, CAPTURED, OURS, SEPARATE, Sources, chosen
from accel.benchmark.schedule import time_backends
from accel.benchmark.timer import BackgroundLoad, Timing
from accel.config.schema import BenchmarkConfig, Config, RuntimeConfig
from accel.errors import AccelError
from accel.graph import files
from accel.graph.bandwidth import bytes_read
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.system.environment import command, copy_bandwidth, machine
from accel.system.hashing import DISTRIBUTION, versions

logger = logging.getLogger(__name__)

MEASUREMENT = "measurement.json"
PLOTS = ("latency.png", "accumulated.png")
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu")


def check(benchmark: BenchmarkConfig, runtime: RuntimeConfig) -> None:
    """Raises `AccelError` on setups that can't be had on `runtime`, or a number that makes no sense."""
    chosen(benchmark.backends, runtime)
    if benchmark.warmup < 0:
        raise AccelError(f"benchmark.warmup={benchmark.warmup}: must be 0 or more")
    if benchmark.warmup_tokens is not None and benchmark.warmup_tokens < 1:
        raise AccelError(f"benchmark.warmup_tokens={benchmark.warmup_tokens}: must be 1 or more, or null")
    if benchmark.time_budget_s is not None and benchmark.time_budget_s < 0:
        raise AccelError(f"benchmark.time_budget_s={benchmark.time_budget_s}: must be 0 or more seconds, or null")


def random_inputs(
    architecture: Architecture, description: PretrainedConfig, benchmark: BenchmarkConfig
) -> dict[str, Tensor]:
    """`batch_size` rows of exactly `source_length` random ids, nothing padded."""
    generator = torch.Generator().manual_seed(benchmark.seed)
    rows = [
        architecture.sample_inputs(description, 1, benchmark.source_length, generator)
        for _ in range(benchmark.batch_size)
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def measure_memory(
    names: Sequence[str], sources: Sources, given: Mapping[str, Tensor], benchmark: BenchmarkConfig
) -> dict[str, dict[str, int]]:
    """Setup -> bytes: `peak` of loading and one generation, and what its decoder's sessions hold: `session` after a few
    tokens, `at the end` after all, with what the caches took on the way.

    `decode alone` is the yardstick for the merged decoder: the step graph by itself, which can't begin a generation.
    """
    sessions = [name for name in (OURS, SEPARATE, CAPTURED) if name in names]
    wanted = [(footprint.PEAK, name) for name in names] + [(footprint.SESSION, name) for name in sessions]
    if OURS in names:
        wanted.append((footprint.SESSION, footprint.DECODE_ALONE))
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        save_file(dict(given), inputs)
        tasks = []
        for kind, name in wanted:
            backend = BACKENDS[OURS if name == footprint.DECODE_ALONE else name]
            options = backend.options(benchmark.new_tokens, benchmark.num_beams)
            tasks.append(
                footprint.Task(
                    kind, name, sources.dump(), benchmark.batch_size, benchmark.source_length, str(inputs), options
                )
            )
        weights = sum(path.stat().st_size for path in Path(sources.graphs).iterdir())
        figures = footprint.measure_all(tasks, weights)
    memory: dict[str, dict[str, int]] = {}
    for (kind, name), figure in zip(wanted, figures, strict=True):
        memory.setdefault(name, {}).update(figure if kind == footprint.SESSION else {kind: figure})
    return memory


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(timings: Mapping[str, Sequence[Timing]], new_tokens: int) -> dict[str, dict[str, Any]]:
    """The figures of every setup: seconds, milliseconds a token, ratios of medians within this run (more is faster)."""
    figures: dict[str, dict[str, Any]] = {}
    positions = latencies(timings)
    for name, repeats in timings.items():
        total = spread([timing.total for timing in repeats])
        figures[name] = {
            "total": total,
            "inside": spread([timing.inside for timing in repeats]),
            "ms_per_token": 1000 * total["median"] / new_tokens,
            "last_over_first": last_over_first(positions[name]),
            "repeats": len(repeats),
            "compiled": all(timing.compiled for timing in repeats),
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


def last_over_first(positions: Sequence[float]) -> float | None:
    """Latency of the last tenth of the tokens over that of the first tenth, medians of each.

    The very first token, which holds the encoder and prefill, is left out. None below two others.
    """
    rest = positions[1:]
    tenth = max(1, len(rest) // 10)
    return statistics.median(rest[-tenth:]) / statistics.median(rest[:tenth]) if len(rest) > 1 else None


def measure_roofline(sources: Sources, benchmark: BenchmarkConfig) -> dict[str, float] | None:
    """What a step must read at half of the new tokens, in bytes, and the seconds that takes; none on the CPU.

    `bandwidth`: bytes a second that a copy on the device reads and writes, measured here.
    """
    device = torch.device(sources.runtime.device)
    if device.type != "cuda":
        return None
    lengths = {
        "batch": benchmark.batch_size * benchmark.num_beams,
        "source": benchmark.source_length,
        "past": benchmark.new_tokens // 2,
    }
    decode = files.load(Path(sources.graphs) / f"{Component.DECODE}.onnx")
    size, bandwidth = bytes_read(decode, sources.cache, lengths), copy_bandwidth(device)
    return {"bytes": size, "bandwidth": bandwidth, "seconds": size / bandwidth}


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `measurement.json`, the plot of latency by position and the plot of accumulated time."""
    benchmark = config.benchmark
    checkpoint = inputs["checkpoint"].folder
    description = AutoConfig.from_pretrained(checkpoint)
    sources = Sources(
        checkpoint=str(checkpoint),
        deployable=str(inputs[_measured(config)].folder),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(description, Component.DECODE).cache,
        runtime=config.runtime,
        dtype=config.precision.dtype,
    )
    names = chosen(benchmark.backends, config.runtime)
    given = random_inputs(architecture, description, benchmark)
    with BackgroundLoad() as others:
        measured = time_backends(names, sources, given, benchmark)
    facts = machine(config.runtime.device, config.runtime.threads) | {"background_load": others.share}
    timings = measured.timings
    memory = measure_memory(names, sources, given, benchmark) if benchmark.memory else {}
    backends = summarize(timings, benchmark.new_tokens)
    limit = measure_roofline(sources, benchmark)
    if limit is not None:
        for name, values in backends.items():
            over = values["total"]["median"] / benchmark.new_tokens / limit["seconds"]
            values["over_roofline"] = over if BACKENDS[name].use_cache else None
    summary = {
        "roofline": limit,
        "point": {key: value for key, value in asdict(benchmark).items() if key not in ("backends", "memory")},
        "precision": config.precision.dtype,
        "machine": facts,
        "packages": versions((*PACKAGES, DISTRIBUTION)),
        "command": command(sys.argv),
        "backends": backends,
        "torch_fp32": measured.fp32,
        "memory": memory,
        "session_ratios": _session_ratios(memory),
    }
    positions = latencies(timings)
    _plot(positions, summary, out)
    raw = {name: [asdict(timing) for timing in repeats] for name, repeats in timings.items()}
    (out / MEASUREMENT).write_text(json.dumps(summary | {"latencies": positions, "repeats": raw}))
    return summary


def _measured(config: Config) -> str:
    return "merge" if config.benchmark.unverified else "verify"


def _session_ratios(memory: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """When -> memory of the merged decoder's session over that of the step graph alone."""
    alone = memory.get(footprint.DECODE_ALONE, {})
    return {when: memory[OURS][when] / size for when, size in alone.items() if size}


def _plot(positions: Mapping[str, Sequence[float]], summary: Mapping[str, Any], out: Path) -> None:
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

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


STAGE = Stage(
    name="benchmark",
    run=run,
    inputs=lambda config: ("checkpoint", "convert", _measured(config)),
    sections=("precision", "runtime", "benchmark"),
    packages=PACKAGES,
    machine=True,
)
