"""The benchmark's figures as tables."""

import logging
from collections.abc import Mapping
from typing import Any

from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS
from accel.cli import console
from accel.stages.benchmark import describe

logger = logging.getLogger(__name__)

COLUMNS = (
    *("backend", "runs", "total s", "model s", "ms a token", "last/first"),
    *("x torch_cache", "x two_files", "x roofline"),
)
RATIOS = ("last_over_first", "vs_torch_cache", "vs_two_files", "over_roofline")
MEMORY_COLUMNS = ("memory", "peak MB", "session MB", "at the end MB")
ABSENT = "-"
BUSY = 0.1  # share of the processor that others may take before the times say little


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row a setup, in the order of `COLUMNS`."""
    drawn: list[list[str]] = []
    for name in (name for name in BACKENDS if name in summary["backends"]):  # a manifest keeps no order
        values = summary["backends"][name]
        total = values["total"]
        drawn.append(
            [
                _named(name, values),
                str(values["repeats"]),
                f"{_seconds(total['median'])} [{_seconds(total['min'])}-{_seconds(total['max'])}]",
                _seconds(values["inside"]["median"]),
                f"{values['ms_per_token']:.2f}",
                *(
                    _ratio(values.get(key))
                    for key in ("last_over_first", "vs_torch_cache", "vs_two_files", "over_roofline")
                ),
            ]
        )
    return drawn


def memory_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row a setup whose memory was measured, and one for the step graph alone, in the order of `MEMORY_COLUMNS`."""
    memory = summary["memory"]
    names = [name for name in (*BACKENDS, footprint.DECODE_ALONE) if name in memory]
    kinds = (footprint.PEAK, footprint.SESSION, footprint.AT_THE_END)
    return [[name, *(_megabytes(memory[name].get(kind)) for kind in kinds)] for name in names]


def _named(name: str, values: Mapping[str, Any]) -> str:
    """The setup, and what a reader must know to compare it."""
    remarks = [] if values["same_tokens"] else ["other tokens"]
    if BACKENDS[name].compiled and not values["compiled"]:
        remarks.append("not compiled")  # transformers' beam search isn't
    return f"{name} ({', '.join(remarks)})" if remarks else name


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}x"


def _megabytes(value: int | None) -> str:
    return ABSENT if value is None else f"{value / 1e6:.0f}"


def show(summary: Mapping[str, Any]) -> None:
    """Print the table, the session memory of the merged decoder over the step graph's, and what to beware of."""
    console.table(f"Benchmark: {describe(summary)}", COLUMNS, rows(summary))
    if summary["memory"]:
        console.table("", MEMORY_COLUMNS, memory_rows(summary))
    if ratios := summary["session_ratios"]:
        console.out.print(
            f"session memory of the merged decoder over that of the step graph alone: {ratios[footprint.SESSION]:.2f}x,"
            f" {ratios[footprint.AT_THE_END]:.2f}x after {summary['point']['new_tokens']} tokens"
        )
    if summary["roofline"] is not None:
        limit = summary["roofline"]
        console.out.print(
            f"x roofline: {limit['seconds'] * 1000:.3f} ms a token, which reading {limit['bytes'] / 1e6:.0f} MB of "
            f"weights and cache takes at the {limit['bandwidth'] / 1e12:.2f} TB/s of a copy measured in this run"
        )
    if summary["torch_fp32"]:
        kept = ", ".join(f"{count} x {name}" for name, count in summary["torch_fp32"].items())
        console.out.print(f"modules that PyTorch's FP16 model keeps in FP32: {kept}")
    if (others := summary["machine"]["background_load"]) > BUSY:
        logger.warning(
            f"other programs took {others:.0%} of the processor during the benchmark: threads that wait by spinning, "
            "PyTorch's above all, were slowed many times over, and the ratios say little. Repeat on a quiet machine."
        )
