"""Benchmark the deployable against other backends: latency, memory and bandwidth utilisation at one setting.

All backends generate the same number of tokens from the same inputs, in worker processes and an interleaved schedule.
Generations of one token, in the same schedule, give the time to first token.

Reads:
    The checkpoint; the graphs of `convert`; the deployable of `verify`, or the bundle of `merge` where
    `benchmark.unverified=true`.

Writes:
    `measurement.json`: all figures and raw timings; `latency.png`: latency by position; `accumulated.png`: accumulated
    time.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from accel.adapters.types import Architecture, Component
from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, CAPTURED, OURS, SEPARATE, Sources, select_backends
from accel.benchmark.figures import spread, token_times
from accel.benchmark.schedule import ScheduleResult, time_backends
from accel.benchmark.timer import BackgroundLoad, Timing
from accel.config.engines import AUTO
from accel.config.schema import BenchmarkConfig, Config, RuntimeConfig
from accel.data.pretrained import load_config
from accel.graph import files
from accel.graph.bandwidth import bytes_read
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.runtime.engine_choice import engines_to_verify
from accel.system.environment import command, machine
from accel.system.hashing import DISTRIBUTION, versions
from accel.system.memory_bandwidth import measure_bandwidth

MEASUREMENT = "measurement.json"
PLOTS = ("latency.png", "accumulated.png")
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu")


def check(benchmark: BenchmarkConfig, runtime: RuntimeConfig) -> None:
    """Check the benchmark's settings.

    Raises:
        AccelError: A backend is unknown, named twice or not available on `runtime`.
    """
    select_backends(benchmark.backends, runtime)


def random_inputs(
    architecture: Architecture, hf_config: PretrainedConfig, benchmark: BenchmarkConfig
) -> dict[str, Tensor]:
    """Return inputs of random ids without padding, [batch_size, source_length]."""
    generator = torch.Generator().manual_seed(benchmark.seed)
    rows = [
        architecture.sample_inputs(hf_config, 1, benchmark.source_length, generator)
        for _ in range(benchmark.batch_size)
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def measure_memory(
    names: Sequence[str], sources: Sources, inputs: Mapping[str, Tensor], benchmark: BenchmarkConfig
) -> dict[str, dict[str, int]]:
    """Measure memory, each figure in a worker process of its own.

    Args:
        names: Backends.
        sources: Files that the backends open.
        inputs: Inputs to generate from, [batch_size, source_length].
        benchmark: Section `benchmark`.

    Returns:
        Backend -> figure -> bytes. `peak`: the peak over loading and one generation. `session`: what the decoder's
        sessions hold after a few tokens. `at the end`: the same after all tokens, with the caches. As a yardstick for
        the merged decoder, `decode alone` is the decode graph by itself, which can't begin a generation.
    """
    measurements = [(footprint.PEAK, name) for name in names]
    measurements += [(footprint.SESSION, name) for name in (OURS, SEPARATE, CAPTURED) if name in names]
    if OURS in names:
        measurements.append((footprint.SESSION, footprint.DECODE_ALONE))
    with TemporaryDirectory() as scratch:
        inputs_file = Path(scratch) / "inputs.safetensors"
        save_file(dict(inputs), inputs_file)
        tasks = []
        for kind, name in measurements:
            backend = BACKENDS[OURS if name == footprint.DECODE_ALONE else name]
            tasks.append(
                footprint.Task(
                    kind,
                    name,
                    sources.dump(),
                    benchmark.batch_size,
                    benchmark.source_length,
                    str(inputs_file),
                    backend.options(benchmark.new_tokens, benchmark.num_beams),
                )
            )
        weight_bytes = sum(path.stat().st_size for path in Path(sources.graphs).iterdir())
        figures = footprint.measure_all(tasks, weight_bytes)
    memory: dict[str, dict[str, int]] = {}
    for (kind, name), figure in zip(measurements, figures, strict=True):
        # A session's figure is a mapping already: `session` and `at the end`.
        memory.setdefault(name, {}).update(figure if kind == footprint.SESSION else {kind: figure})
    return memory


def summarize(measured: ScheduleResult, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Compute the figures of every backend.

    Args:
        measured: The timings of all backends.
        new_tokens: Tokens generated in each repeat.

    Returns:
        Backend -> figures: seconds in total and inside the model's calls, time to first token and time per output token
        in ms (`figures.token_times`), and ratios of median totals to other backends of this run, where more than 1 is
        faster than the other. `engine` computed the decode steps; None for PyTorch.
    """
    figures: dict[str, dict[str, Any]] = {}
    timings = measured.timings
    positions = latencies(timings)
    for name, repeats in timings.items():
        figures[name] = {
            "total": spread([timing.total for timing in repeats]),
            "inside": spread([timing.inside for timing in repeats]),
            **token_times(repeats, measured.first_tokens[name], new_tokens),
            "last_over_first": last_over_first(positions[name]),
            "repeats": len(repeats),
            "compiled": all(timing.compiled for timing in repeats),
            "engine": repeats[0].engine,
        }
    compared = BASELINE if BASELINE in timings else next(iter(timings))
    expected_tokens = timings[compared][0].tokens
    for name, values in figures.items():
        for key, other in (("vs_torch_cache", BASELINE), ("vs_two_files", SEPARATE)):
            values[key] = figures[other]["total"]["median"] / values["total"]["median"] if other in figures else None
        values["same_tokens"] = all(timing.tokens == expected_tokens for timing in timings[name])
    return figures


def latencies(timings: Mapping[str, Sequence[Timing]]) -> dict[str, list[float]]:
    """Return each backend's latency in seconds at each position, medians over the repeats."""
    medians: dict[str, list[float]] = {}
    for name, repeats in timings.items():
        by_position = zip(*[timing.latencies for timing in repeats], strict=True)
        medians[name] = [statistics.median(seconds) for seconds in by_position]
    return medians


def last_over_first(positions: Sequence[float]) -> float | None:
    """Return the median latency of the last tenth of the tokens over that of the first tenth.

    The first token is left out, because its latency includes encoder and prefill. None with fewer than two others.

    Args:
        positions: Latency in seconds of each token.
    """
    rest = positions[1:]
    if len(rest) < 2:
        return None
    tenth = max(1, len(rest) // 10)
    return statistics.median(rest[-tenth:]) / statistics.median(rest[:tenth])


def measure_roofline(sources: Sources, benchmark: BenchmarkConfig) -> dict[str, Any] | None:
    """Compute the least time of a decode step, as its memory traffic over the measured bandwidth.

    Returns:
        `bytes` that a decode step reads with half of the new tokens in the cache; `bandwidth` in bytes per second, and
        what it is that of, `measured`: a `copy` on a GPU, which reads and writes, or `read` by the processor; and
        `seconds`, the ratio of bytes and bandwidth. None where the device computes in another dtype than the graph's.
    """
    runtime = sources.runtime
    if runtime.compute_dtype.get(sources.dtype) != sources.dtype:
        return None
    lengths = {
        "batch_size": benchmark.batch_size * benchmark.num_beams,
        "source": benchmark.source_length,
        "past": benchmark.new_tokens // 2,
    }
    decode = files.load(Path(sources.graphs) / f"{Component.DECODE}.onnx")
    size = bytes_read(decode, sources.cache, lengths)
    measured, bandwidth = measure_bandwidth(torch.device(runtime.device), runtime.threads)
    return {"bytes": size, "measured": measured, "bandwidth": bandwidth, "seconds": size / bandwidth}


def add_bandwidth(backends: Mapping[str, dict[str, Any]], roofline: Mapping[str, Any] | None, new_tokens: int) -> None:
    """Add to each backend's figures how far it is from the roofline; None where there is none.

    The bytes are the same for all: weights and caches, once a token. A backend that reads more, such as one without a
    cache or with weights in FP32, is that much further away.

    Args:
        backends: Backend -> figures of `summarize`. Gets `over_roofline`, total time per token over the roofline's; and
            `bandwidth_utilization` (MBU): the bytes over the median time per output token, as a share of the bandwidth;
            see https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices. That one is None
            as well where there is no such time.
        roofline: What `measure_roofline` returned.
        new_tokens: Tokens generated in each repeat.
    """
    for values in backends.values():
        each = values["time_per_output_token_ms"]
        limit = None if roofline is None else roofline["seconds"]
        total = values["total"]["median"] / new_tokens
        values["over_roofline"] = None if limit is None else total / limit
        timed = each is not None and each["median"] > 0  # in a disturbed run one token may take longer than all
        values["bandwidth_utilization"] = 1000 * limit / each["median"] if limit is not None and timed else None


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `measurement.json` and the plots. Return the content of `measurement.json` without the raw timings."""
    benchmark = config.benchmark
    checkpoint = inputs["checkpoint"].folder
    hf_config = load_config(checkpoint)
    sources = Sources(
        checkpoint=str(checkpoint),
        deployable=str(inputs[_measured_stage(config)].folder),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(hf_config, Component.DECODE).cache,
        runtime=_measured_runtime(config),
        dtype=config.precision.dtype,
    )
    names = select_backends(benchmark.backends, config.runtime)
    model_inputs = random_inputs(architecture, hf_config, benchmark)
    with BackgroundLoad() as background:
        measured = time_backends(names, sources, model_inputs, benchmark)
    facts = machine(config.runtime.device, config.runtime.threads) | {"background_load": background.share}
    memory = measure_memory(names, sources, model_inputs, benchmark) if benchmark.memory else {}
    backends = summarize(measured, benchmark.new_tokens)
    roofline = measure_roofline(sources, benchmark)
    add_bandwidth(backends, roofline, benchmark.new_tokens)
    summary = {
        "roofline": roofline,
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
    positions = latencies(measured.timings)
    _plot(positions, summary, out)
    raw = asdict(measured)
    details = {"latencies": positions, "repeats": raw["timings"], "first_token_repeats": raw["first_tokens"]}
    (out / MEASUREMENT).write_text(json.dumps(summary | details))
    return summary


def _measured_stage(config: Config) -> str:
    """Return the stage whose artifact is measured."""
    return "merge" if config.benchmark.unverified else "verify"


def _measured_runtime(config: Config) -> RuntimeConfig:
    """Return the runtime, with the engine that `verify` would try first where nobody verified the bundle."""
    runtime = config.runtime
    if not (config.benchmark.unverified and runtime.static and runtime.engine == AUTO):
        return runtime
    engines = engines_to_verify(AUTO, torch.device(runtime.device), config.precision.dtype)
    return replace(runtime, engine=engines[0])


def _session_ratios(memory: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return the merged decoder's session memory over that of the decode graph alone, by figure."""
    alone = memory.get(footprint.DECODE_ALONE, {})
    return {when: memory[OURS][when] / size for when, size in alone.items() if size}


def _plot(positions: Mapping[str, Sequence[float]], summary: Mapping[str, Any], out: Path) -> None:
    """Plot latency and accumulated time by position."""
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

    title = describe(summary)
    plots.latency(positions, title, out / PLOTS[0])
    plots.accumulated(positions, title, out / PLOTS[1])


def describe(summary: Mapping[str, Any]) -> str:
    """Return one line on the setting that was measured."""
    point, facts = summary["point"], summary["machine"]
    beams = "greedy" if point["num_beams"] == 1 else f"{point['num_beams']} beams"
    return (
        f"{point['new_tokens']} new tokens, {beams}, source length {point['source_length']}, "
        f"batch size {point['batch_size']}, {summary['precision']}, {facts['device']}, {facts['threads']} threads"
    )


STAGE = Stage(
    name="benchmark",
    run=run,
    inputs=lambda config: ("checkpoint", "convert", _measured_stage(config)),
    sections=("precision", "runtime", "benchmark"),
    packages=PACKAGES,
    machine=True,
)
