"""Latency and memory of a deployable beside PyTorch's, for the certificate."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from transformers import AutoConfig

from accel.adapters.types import Architecture, Component
from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, Sources, ours
from accel.benchmark.schedule import time_backends
from accel.config.schema import BenchmarkConfig, Config
from accel.data import texts
from accel.pipeline.store import Artifact

REPEATS = 5


def beside_torch(
    deployable: Path, config: Config, inputs: Mapping[str, Artifact], architecture: Architecture
) -> dict[str, Any] | None:
    """Time a greedy generation of `verify.max_new_tokens` tokens, by PyTorch with cache and by the deployable, in turn.

    Returns seconds and the bytes of memory at the peak, as JSON; None where the runtime can't run the precision.
    """
    dtype, verify = config.precision.dtype, config.verify
    if dtype not in config.runtime.compute_dtype:
        return None
    description = AutoConfig.from_pretrained(inputs["checkpoint"].folder)
    sources = Sources(
        checkpoint=str(inputs["checkpoint"].folder),
        deployable=str(deployable),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(description, Component.DECODE).cache,
        runtime=config.runtime,
        dtype=dtype,
    )
    compared = (BASELINE, ours(config.runtime))
    given = texts.random_inputs(architecture, description, 1, verify.source_length, verify.seed)[0]
    point = BenchmarkConfig(verify.source_length, verify.max_new_tokens, repeats=REPEATS, warmup_tokens=None)
    timings = time_backends(compared, sources, given, point).timings
    peaks = _peaks(compared, sources, given, point)
    figures: dict[str, dict[str, Any]] = {}
    for name in compared:
        totals = [timing.total for timing in timings[name]]
        seconds = {"median": statistics.median(totals), "min": min(totals), "max": max(totals)}
        figures[name] = {"seconds": seconds, "peak_memory": peaks[name]}
    return {
        "source_length": verify.source_length,
        "new_tokens": verify.max_new_tokens,
        "repeats": REPEATS,
        "compute_dtype": config.runtime.compute_dtype[dtype],
        "ratio": figures[BASELINE]["seconds"]["median"] / figures[compared[1]]["seconds"]["median"],
        "backends": figures,
    }


def _peaks(
    names: tuple[str, ...], sources: Sources, given: Mapping[str, Any], point: BenchmarkConfig
) -> dict[str, int]:
    """Setup -> bytes at the peak of loading and one generation."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "inputs.safetensors"
        save_file(dict(given), path)
        shape = (sources.dump(), 1, point.source_length, str(path))
        tasks = [
            footprint.Task(footprint.PEAK, name, *shape, BACKENDS[name].options(point.new_tokens, 1)) for name in names
        ]
        return dict(zip(names, footprint.measure_all(tasks, 0), strict=True))
