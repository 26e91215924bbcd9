"""Latency and memory of a deployable beside PyTorch's, each in a process of its own, one after the other."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from transformers import AutoConfig

from accel.adapters.types import Architecture, Role
from accel.benchmark import footprint
from accel.benchmark.backends import BASELINE, SETUPS, Sources, ours
from accel.config.schema import Config
from accel.data import texts
from accel.pipeline.store import Artifact


def beside_torch(
    deployable: Path, config: Config, inputs: Mapping[str, Artifact], architecture: Architecture
) -> dict[str, Any] | None:
    """Seconds of a greedy generation of `verify.max_new_tokens` tokens and bytes at its peak, for PyTorch with cache
    and for the deployable; None where the runtime can't run it."""
    dtype, verify = config.precision.dtype, config.verify
    if dtype not in config.runtime.arithmetic:
        return None
    description = AutoConfig.from_pretrained(inputs["checkpoint"].folder)
    sources = Sources(
        checkpoint=str(inputs["checkpoint"].folder),
        deployable=str(deployable),
        graphs=str(inputs["convert"].folder),
        cache=architecture.signature(description, Role.STEP).cache,
        runtime=config.runtime,
        dtype=dtype,
    )
    compared = (BASELINE, ours(config.runtime))
    given = texts.random_inputs(architecture, description, 1, verify.source_length, verify.seed)[0]
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "inputs.safetensors"
        save_file(dict(given), path)
        tasks = [
            footprint.Task(
                *(footprint.TIMED, name, sources.dump(), 1, verify.source_length, str(path)),
                SETUPS[name].options(verify.max_new_tokens, 1),
            )
            for name in compared
        ]
        found = footprint.measure_all(tasks, 0)
    figures = {
        name: {
            "seconds": {
                "median": statistics.median(figure["seconds"]),
                "min": min(figure["seconds"]),
                "max": max(figure["seconds"]),
            },
            "peak_memory": figure["peak"],
        }
        for name, figure in zip(compared, found, strict=True)
    }
    ratio = figures[BASELINE]["seconds"]["median"] / figures[compared[1]]["seconds"]["median"]
    return {
        "source_length": verify.source_length,
        "new_tokens": verify.max_new_tokens,
        "repeats": footprint.REPEATS,
        "arithmetic": config.runtime.arithmetic[dtype],
        "ratio": ratio,
        "setups": figures,
    }
