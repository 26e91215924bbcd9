"""Latency and peak memory of a deployable beside PyTorch's, for the certificate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.adapters.types import Architecture, Component
from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, Sources, deployable_backend
from accel.benchmark.figures import spread, token_times
from accel.benchmark.process import begin_imports
from accel.benchmark.schedule import time_backends
from accel.config.schema import BenchmarkConfig, Config, VerifyConfig
from accel.data import texts
from accel.data.pretrained import load_config
from accel.pipeline.store import Artifact

REPEATS = 3
TIME_BUDGET_S = 2.0  # of measured generations, after which a backend gets no further repeat
# Warm-ups beyond the generation of full length that memory is measured with. A GPU captures graphs at the second.
WARMUP = {"cpu": 0, "cuda": 2}
WARMUP_TOKENS = 2


def prepare(config: Config, device: str) -> None:
    """Begin the imports that `compare_with_torch` needs, if the runtime computes on a `device` of this type.

    To be called for `cuda` before the bundle is examined, which leaves most cores idle, and for `cpu` after it, since
    imports take a third of a gigabyte.
    """
    if config.verify.latency and torch.device(config.runtime.device).type == device:
        begin_imports(spawned=0 if device == "cpu" else 2)  # one for each model


def compare_with_torch(
    deployable: Path, config: Config, inputs: Mapping[str, Artifact], architecture: Architecture
) -> dict[str, Any] | None:
    """Time greedy generation of `verify.max_new_tokens` tokens, by PyTorch with a cache and then by the deployable.

    Only one of them is in memory at a time, as in all of `verify`, so that it takes no more memory than the rest. The
    stage `benchmark` lets them generate in turn, which a slow minute of the machine affects alike.

    Args:
        deployable: Folder of the merged decoder.
        config: The configuration: `precision`, `runtime` and `verify` are read.
        inputs: The artifacts `checkpoint` and `convert`.
        architecture: The checkpoint's adapter.

    Returns:
        Of both backends, as JSON: seconds, time to first token, time per output token, the number of generations timed,
        and bytes of peak memory; with `verify.session_memory` also the bytes that the deployable's decoder sessions
        hold. None where the runtime can't run the precision.
    """
    dtype, verify = config.precision.dtype, config.verify
    if dtype not in config.runtime.compute_dtype:
        return None
    description = load_config(inputs["checkpoint"].folder)
    sources = Sources(
        checkpoint=str(inputs["checkpoint"].folder),
        deployable=str(deployable),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(description, Component.DECODE).cache,
        runtime=config.runtime,
        dtype=dtype,
    )
    accelerated = deployable_backend(config.runtime)
    names = (BASELINE, accelerated)
    model_inputs = texts.random_inputs(architecture, description, 1, verify.source_length, verify.seed)[0]
    benchmark = BenchmarkConfig(
        source_length=verify.source_length,
        new_tokens=verify.max_new_tokens,
        repeats=REPEATS,
        time_budget_s=TIME_BUDGET_S,
        warmup=WARMUP[torch.device(config.runtime.device).type],
        warmup_tokens=WARMUP_TOKENS,
    )
    figures = {name: _measure(name, sources, model_inputs, benchmark) for name in names}
    if verify.session_memory:
        figures[accelerated]["session_memory"] = _session_memory(accelerated, sources, verify)
    return {
        "source_length": verify.source_length,
        "new_tokens": verify.max_new_tokens,
        "repeats": REPEATS,
        "compute_dtype": config.runtime.compute_dtype[dtype],
        "ratio": figures[BASELINE]["seconds"]["median"] / figures[accelerated]["seconds"]["median"],
        "backends": figures,
    }


def _measure(name: str, sources: Sources, inputs: Mapping[str, Tensor], benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Return the figures of one backend: see `compare_with_torch`."""
    measured = time_backends((name,), sources, inputs, benchmark, generate_first=True)
    return {
        "seconds": spread([timing.total for timing in measured.timings[name]]),
        **token_times(measured.timings[name], measured.first_tokens[name], benchmark.new_tokens),
        "repeats": len(measured.timings[name]),
        "peak_memory": measured.peaks[BACKENDS[name].model],
    }


def _session_memory(backend: str, sources: Sources, verify: VerifyConfig) -> int:
    """Return the bytes that a deployable's decoder sessions hold, see `footprint.session_memory`, for one row."""
    options = {"num_beams": 1, "max_new_tokens": verify.max_new_tokens}
    task = footprint.Task(footprint.SESSION, backend, sources.dump(), 1, verify.source_length, "", options)
    measured: dict[str, int] = footprint.measure_all([task], weight_bytes=0)[0]
    return measured[footprint.SESSION]
