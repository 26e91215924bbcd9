"""Table of a sweep's jobs, rewritten after every job, so that an interrupted sweep still leaves its results."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock

from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, OURS, SEPARATE
from accel.cli import verification_cells
from accel.cli.benchmark_table import ABSENT, times, token_medians

TABLE, RECORD = "table.md", "table.json"
TOTALS, FIRST_TOKEN, PER_TOKEN, SPEED_UP = "sweep.png", "first_token.png", "per_token.png", "speed_up.png"
COMPARISON = "comparison.png"
PLOTS = (TOTALS, FIRST_TOKEN, PER_TOKEN, SPEED_UP)  # of benchmarks
Y_AXES = {
    TOTALS: "total (s)",
    FIRST_TOKEN: "time to first token (ms)",
    PER_TOKEN: "time per output token (ms)",
}
LENGTH = "benchmark.new_tokens"
ERROR_WIDTH = 160  # characters of an error in the table; the record keeps all of it
RATIOS = ("x torch_cache", "x two_files", "last/first", "session ratio")
SECONDS = " (s)"  # end of the columns of seconds, after the backend's name
TIMES = "Seconds are medians, followed by [time to first token, time per output token after it] in ms."


def record(
    settings: Any, overrides: Sequence[str], summaries: Mapping[str, Mapping[str, Any]], error: str | None
) -> Path:
    """Add a job to its sweep's table, record and plots.

    Args:
        settings: Hydra's own configuration, `HydraConfig.get()`.
        overrides: Overrides of the job, as `key=value`.
        summaries: Summaries of the stages `benchmark` and `verify`, if they were run; that of `verify` also if
            verification failed.
        error: Message that the job ended with, or None.

    Returns:
        The path of the table.
    """
    folder = Path(str(settings.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".table.lock"):  # a launcher may run jobs at the same time
        number = int(settings.job.num)
        jobs = [job for job in _read(folder / RECORD) if job["number"] != number]
        jobs.append(
            {
                "number": number,
                "overrides": dict(_split(override) for override in overrides),
                "error": error,
                "verify": summaries.get("verify"),
                **_benchmark_fields(summaries.get("benchmark")),
            }
        )
        jobs.sort(key=lambda job: int(job["number"]))
        _write(folder / RECORD, json.dumps(jobs, indent=1))
        _write(folder / TABLE, markdown(jobs))
        if any(job["backends"] for job in jobs):
            _plot(jobs, folder)
        if sum(job["verify"] is not None for job in jobs) > 1:
            _plot_comparison(jobs, folder / COMPARISON)
    return folder / TABLE


def _split(override: str) -> tuple[str, str]:
    """Split an override into key and value."""
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _benchmark_fields(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a job's record that come from the stage `benchmark`; empty ones if it was not run."""
    if summary is None:
        return {"point": {}, "backends": {}, "session_ratios": {}, "device": None, "precision": None}
    return {
        "point": summary["point"],
        "backends": summary["backends"],
        "session_ratios": summary["session_ratios"],
        "precision": summary["precision"],
        "device": summary["machine"]["device"],
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the jobs recorded so far."""
    jobs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return jobs


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that it can be read at any time."""
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def varying(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the override keys in which the jobs differ; all of them if there is only one job."""
    keys = list(dict.fromkeys(key for job in jobs for key in job["overrides"]))
    return [key for key in keys if len(jobs) == 1 or len({job["overrides"].get(key) for job in jobs}) > 1]


def columns(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table's header.

    These are the varying overrides, the results of `verify`, the seconds of each measured backend, the ratios, and the
    error if a job has one.
    """
    verification = dict.fromkeys(name for job in jobs for name in verification_cells.cells(job["verify"]))
    backends = [name for name in BACKENDS if any(name in job["backends"] for job in jobs)]
    ratios = RATIOS if OURS in backends else ()
    errors = ["error"] if any(job["error"] for job in jobs) else []
    return [*varying(jobs), *verification, *(f"{name}{SECONDS}" for name in backends), *ratios, *errors]


def rows(jobs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return one row per job, with the columns of `columns`."""
    names = columns(jobs)
    return [[_cell(job, name) for name in names] for job in jobs]


def _cell(job: Mapping[str, Any], column: str) -> str:
    """Return a job's cell in one column."""
    if column in RATIOS:
        value = _ratios(job)[column]
        return ABSENT if value is None else f"{value:.2f}"
    verification = verification_cells.cells(job["verify"])
    if column in verification:
        return verification[column]
    if column == "error":
        return shorten(str(job["error"] or ""), ERROR_WIDTH, placeholder=" ...")
    backend = column.removesuffix(SECONDS)
    if column.endswith(SECONDS) and backend in BACKENDS:
        values = job["backends"].get(backend)
        if values is None:
            return ABSENT
        uncompiled = BACKENDS[backend].compiled and not values["compiled"]  # transformers compiles no beam search
        return f"{times(values['total'], values)}{' (not compiled)' if uncompiled else ''}"
    return str(job["overrides"].get(column, ABSENT))


def _ratios(job: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the ratios of a job's merged decoder, by column; None where one was not measured."""
    merged = job["backends"].get(OURS, {})
    return {
        "x torch_cache": merged.get("vs_torch_cache"),
        "x two_files": merged.get("vs_two_files"),
        "last/first": merged.get("last_over_first"),
        "session ratio": job["session_ratios"].get(footprint.SESSION),
    }


def markdown(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in Markdown, with the overrides and the device that all jobs share above it."""
    names = columns(jobs)
    different = varying(jobs)
    common = {key: value for job in jobs for key, value in job["overrides"].items() if key not in different}
    lines = []
    if common:
        lines += ["In all jobs: " + " ".join(f"`{key}={value}`" for key, value in common.items()), ""]
    device = label(jobs)
    if device:
        lines += [f"On {device}.", ""]
    for cells in (names, ["---"] * len(names), *rows(jobs)):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for paragraph in verification_cells.notes([job["verify"] for job in jobs if job["verify"]]):
        lines += ["", paragraph]
    if any(job["backends"] or (job["verify"] and job["verify"]["speed"]) for job in jobs):
        lines += ["", TIMES]
    if any(job["backends"] for job in jobs):
        lines += [
            "",
            f"`x` columns: time of {BASELINE} or {SEPARATE} over that of {OURS}, in the same job. "
            f"last/first: latency of the last tenth of the tokens over that of the first tenth, {OURS}. "
            "session ratio: session memory of the merged decoder over that of the decode graph alone.",
        ]
    return "\n".join(lines) + "\n"


def label(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the devices and precisions of the jobs that were measured."""
    return "; ".join(dict.fromkeys(f"{job['device']}, {job['precision']}" for job in jobs if job["backends"]))


def _plot(jobs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Plot seconds, time to first token and time per output token over new tokens, and the speed-up as a heat map.

    There is one panel per combination of the other varying overrides.
    """
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

    other_keys = [key for key in varying(jobs) if key != LENGTH]
    points, cells = [], []
    for job in jobs:
        panel = ", ".join(f"{key.rsplit('.', 1)[-1]}={job['overrides'].get(key, ABSENT)}" for key in other_keys)
        coordinates = {"new tokens": job["point"].get("new_tokens"), "jobs": panel}
        for name in BACKENDS:
            if name in job["backends"]:
                values = job["backends"][name]
                figures = dict(zip(Y_AXES.values(), [values["total"]["median"], *token_medians(values)], strict=True))
                points.append({**coordinates, **figures, "backend": name})
        ratio = job["backends"].get(OURS, {}).get("vs_torch_cache")
        if ratio is not None:
            cells.append({**coordinates, "ratio": ratio})
    title = label(jobs)
    for file, y in Y_AXES.items():
        measured = [point for point in points if point[y] is not None]
        if measured:
            plots.sweep(measured, "new tokens", y, "backend", "jobs", title, folder / file)
    if cells:
        plots.grid(
            cells, "new tokens", "jobs", "ratio", f"time of {BASELINE} / time of {OURS}\n{title}", folder / SPEED_UP
        )


def _plot_comparison(jobs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the figures of the verified jobs side by side: one panel a figure, one bar a job."""
    from accel.reporting import plots

    panels: dict[str, dict[str, float]] = {}
    labels = []
    for job in jobs:
        if job["verify"] is None:
            continue
        label = ", ".join(str(job["overrides"].get(key, ABSENT)) for key in varying(jobs))
        labels.append(label)
        for name, value in verification_cells.figures(job["verify"]).items():
            panels.setdefault(name, {})[label] = value
    omitted = {*varying(jobs), "artifacts"}  # a path says nothing about the figures
    common = {key: value for job in jobs for key, value in job["overrides"].items() if key not in omitted}
    plots.comparison(panels, labels, " ".join(f"{key}={value}" for key, value in common.items()), path)
