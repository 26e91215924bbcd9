"""One table over the jobs of a sweep, rewritten after every job, so that a sweep cut short still leaves its figures."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from accel.setups import BASELINE, OURS, SEPARATE, SETUPS

TABLE, RECORD, PLOT = "table.md", "table.json", "sweep.png"
LENGTH = "benchmark.new_tokens"
ABSENT = "-"


def record(settings: Any, overrides: Sequence[str], summary: Mapping[str, Any] | None, error: str | None) -> Path:
    """Add a job to its sweep's table, and return the table's path.

    `settings`: Hydra's own configuration (`HydraConfig.get()`). `overrides`: the job's, as `key=value`. `summary`:
    what `benchmark` returned, None if the job failed with `error` or measured nothing.
    """
    folder = Path(str(settings.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".table.lock"):  # a launcher may run jobs at the same time
        jobs = _read(folder / RECORD)
        number = int(settings.job.num)
        jobs = [job for job in jobs if job["number"] != number]
        jobs.append(
            {"number": number, "overrides": dict(_split(item) for item in overrides), "error": error, **_kept(summary)}
        )
        jobs.sort(key=lambda job: int(job["number"]))
        _write(folder / RECORD, json.dumps(jobs, indent=1))
        _write(folder / TABLE, markdown(jobs))
        if any(job["setups"] for job in jobs):
            _plot(jobs, folder / PLOT)
    return folder / TABLE


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _kept(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    if summary is None:
        return {"point": {}, "setups": {}, "session_ratio": None}
    return {key: summary[key] for key in ("point", "setups", "session_ratio")}


def _read(path: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return jobs


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def varying(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The override keys in which the jobs differ; all of them while there is only one job."""
    keys = list(dict.fromkeys(key for job in jobs for key in job["overrides"]))
    return [key for key in keys if len(jobs) == 1 or len({job["overrides"].get(key) for job in jobs}) > 1]


def columns(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's header: what varies, seconds of every setup that was measured, the ratios, the error if any."""
    setups = [name for name in SETUPS if any(name in job["setups"] for job in jobs)]
    ratios = ["x torch+cache", "x two files", "session ratio"] if OURS in setups else []
    errors = ["error"] if any(job["error"] for job in jobs) else []
    return [*varying(jobs), *(f"{name} (s)" for name in setups), *ratios, *errors]


def rows(jobs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a job, in the order of `columns`."""
    names = columns(jobs)
    return [[_cell(job, name) for name in names] for job in jobs]


def _cell(job: Mapping[str, Any], column: str) -> str:
    ours = job["setups"].get(OURS, {})
    ratio = {
        "x torch+cache": ours.get("vs_torch_cache"),
        "x two files": ours.get("vs_two_files"),
        "session ratio": job["session_ratio"],
    }
    if column in ratio:
        value = ratio[column]
        return ABSENT if value is None else f"{value:.2f}"
    if column == "error":
        return " ".join(str(job["error"] or "").split())
    if column.endswith(" (s)") and (name := column.removesuffix(" (s)")) in SETUPS:
        return f"{job['setups'][name]['total']['median']:.3f}" if name in job["setups"] else ABSENT
    return str(job["overrides"].get(column, ABSENT))


def markdown(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The table, and above it what all jobs have in common."""
    names = columns(jobs)
    changing = varying(jobs)
    common = {key: value for job in jobs for key, value in job["overrides"].items() if key not in changing}
    given = " ".join(f"`{key}={value}`" for key, value in common.items())
    lines = [f"In all jobs: {given}", ""] if common else []
    for cells in (names, ["---"] * len(names), *rows(jobs)):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", f"Seconds are medians; ratios are {OURS} against {BASELINE} and against {SEPARATE}, of the same job."]
    return "\n".join(lines) + "\n"


def _plot(jobs: Sequence[Mapping[str, Any]], path: Path) -> None:
    from accel import plots  # imports matplotlib, which nothing else needs

    others = [key for key in varying(jobs) if key != LENGTH]
    points = []
    for job in jobs:
        panel = ", ".join(f"{key.rsplit('.', 1)[-1]}={job['overrides'].get(key, ABSENT)}" for key in others)
        for name in (name for name in SETUPS if name in job["setups"]):
            seconds = job["setups"][name]["total"]["median"]
            points.append(
                {"new tokens": job["point"]["new_tokens"], "total (s)": seconds, "setup": name, "jobs": panel}
            )
    plots.sweep(points, "new tokens", "total (s)", "setup", "jobs", path)
