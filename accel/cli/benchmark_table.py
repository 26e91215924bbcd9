"""Tables of the benchmark's results."""

import logging
from collections.abc import Mapping
from typing import Any

from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS
from accel.cli import console
from accel.config.engines import FUSED
from accel.stages.benchmark import describe
from accel.system.memory_bandwidth import COPY

logger = logging.getLogger(__name__)

COLUMNS = (
    "backend",
    "runs",
    "total s",
    "TTFT ms",
    "TPOT ms",
    "x torch\n_cache",
    "x two_\nfiles",
    "x roof-\nline",
    "MBU",
)  # at most 120 characters wide with the longest name of a backend
TOKEN_TIMES = ("time_to_first_token_ms", "time_per_output_token_ms")  # missing from results of old versions
RATIOS = ("vs_torch_cache", "vs_two_files", "over_roofline")
LEGEND = "TTFT: time to first token. TPOT: time per output token after the first. Medians [fastest-slowest]."
MEMORY_COLUMNS = ("memory", "peak MB", "session MB", "at the end MB")
ABSENT = "-"
BUSY = 0.1  # share of the processor taken by other programs, above which the times are unreliable


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per backend, with the columns `COLUMNS`.

    Args:
        summary: Summary of the stage `benchmark`.
    """
    table_rows = []
    for name in BACKENDS:  # in this order: a manifest doesn't keep the order of keys
        if name not in summary["backends"]:
            continue
        values = summary["backends"][name]
        row = [_label(name, values), str(values["repeats"]), _seconds(values["total"]["median"])]
        row += [_spread(values.get(key)) for key in TOKEN_TIMES]
        row += [_ratio(values.get(key)) for key in RATIOS]
        row.append(_percentage(values.get("bandwidth_utilization")))
        table_rows.append(row)
    return table_rows


def memory_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per backend whose memory was measured, with the columns `MEMORY_COLUMNS`.

    The last row is the decode graph alone, with which the merged decoder's session is compared.

    Args:
        summary: Summary of the stage `benchmark`.
    """
    memory = summary["memory"]
    names = [name for name in (*BACKENDS, footprint.DECODE_ALONE) if name in memory]
    kinds = (footprint.PEAK, footprint.SESSION, footprint.AT_THE_END)
    return [[name, *(_megabytes(memory[name].get(kind)) for kind in kinds)] for name in names]


def _label(name: str, values: Mapping[str, Any]) -> str:
    """Return the backend's name with the remarks needed to compare it."""
    remarks = []
    if not values["same_tokens"]:
        remarks.append("other tokens")
    if BACKENDS[name].compiled and not values["compiled"]:
        remarks.append("not compiled")  # transformers doesn't compile the decoder in beam search
    if values.get("engine") == FUSED:
        remarks.append(FUSED)
    return f"{name} ({', '.join(remarks)})" if remarks else name


def _seconds(value: float) -> str:
    """Format seconds with about three digits."""
    if value < 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Format milliseconds with about three digits."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _spread(value: Mapping[str, float] | None) -> str:
    """Format median, minimum and maximum of milliseconds; `ABSENT` if there are none."""
    if value is None:
        return ABSENT
    return f"{milliseconds(value['median'])} [{milliseconds(value['min'])}-{milliseconds(value['max'])}]"


def _ratio(value: float | None) -> str:
    """Format a ratio; `ABSENT` if it was not measured."""
    return ABSENT if value is None else f"{value:.2f}x"


def _percentage(value: float | None) -> str:
    """Format a share as a percentage; `ABSENT` if it was not measured."""
    return ABSENT if value is None else f"{value:.0%}"


def _megabytes(value: int | None) -> str:
    """Format bytes as megabytes; `ABSENT` if they were not measured."""
    return ABSENT if value is None else f"{value / 1e6:.0f}"


def _about_roofline(roofline: Mapping[str, Any]) -> str:
    """Return what the columns about memory bandwidth mean."""
    copied = roofline.get("measured", COPY) == COPY  # results of old versions don't say so: they are of GPUs
    bandwidth = f"{roofline['bandwidth'] / 1e12:.2f} TB/s" if copied else f"{roofline['bandwidth'] / 1e9:.1f} GB/s"
    of = "the bandwidth of a copy on the device" if copied else "the bandwidth at which the processor reads memory"
    exceeding = "" if copied else ", more than 100% where weights fit into caches of the processor"
    return (
        f"x roofline: total time per token relative to {roofline['seconds'] * 1000:.3f} ms, the time it takes to read "
        f"{roofline['bytes'] / 1e6:.0f} MB of weights and caches once at {bandwidth}, {of} measured in this run. "
        f"MBU (memory bandwidth utilization): that time relative to TPOT{exceeding}"
    )


def show(summary: Mapping[str, Any]) -> None:
    """Print latency and memory of each backend, and log a warning if other programs disturbed the measurement.

    Args:
        summary: Summary of the stage `benchmark`.
    """
    console.table(f"Benchmark: {describe(summary)}", COLUMNS, rows(summary))
    console.out.print(LEGEND, markup=False)
    if summary["memory"]:
        console.table("", MEMORY_COLUMNS, memory_rows(summary))
    ratios = summary["session_ratios"]
    if ratios:
        console.out.print(
            f"session memory, merged decoder relative to the decode graph alone: {ratios[footprint.SESSION]:.2f}x,"
            f" {ratios[footprint.AT_THE_END]:.2f}x after {summary['point']['new_tokens']} tokens"
        )
    roofline = summary["roofline"]
    if roofline is not None:
        console.out.print(_about_roofline(roofline), markup=False)
    if summary["torch_fp32"]:
        modules = ", ".join(f"{count} x {name}" for name, count in summary["torch_fp32"].items())
        console.out.print(f"modules that PyTorch's FP16 model keeps in FP32: {modules}")
    background_load = summary["machine"]["background_load"]
    if background_load > BUSY:
        logger.warning(
            f"other programs took {background_load:.0%} of the processor during the benchmark. That slows down threads "
            "that wait by spinning, PyTorch's most of all, so the ratios are unreliable. Repeat on an idle machine."
        )


def token_medians(figures: Mapping[str, Any]) -> list[float | None]:
    """Return a backend's median time to first token and time per output token, in ms; None where not measured."""
    return [figures[key]["median"] if figures.get(key) else None for key in TOKEN_TIMES]


def times(total: Mapping[str, float], figures: Mapping[str, Any]) -> str:
    """Format a backend's median seconds and, if they were measured, its `token_medians`."""
    medians = token_medians(figures)
    cells = ", ".join(ABSENT if time is None else milliseconds(time) for time in medians)
    return f"{total['median']:.3f}" + (f" [{cells}]" if any(medians) else "")
