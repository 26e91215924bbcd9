"""One table over the jobs of a sweep, rewritten after every job, so that a sweep cut short still leaves its figures."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock

from accel.benchmark import footprint
from accel.benchmark.backends import BACKENDS, BASELINE, OURS, SEPARATE

TABLE, RECORD = "table.md", "table.json"
TOTALS, PER_TOKEN, SPEED_UP = PLOTS = ("sweep.png", "per_token.png", "speed_up.png")
LENGTH = "benchmark.new_tokens"
ABSENT = "-"
LONGEST = 160  # characters of an error in the table; the record holds all


def record(
    settings: Any, overrides: Sequence[str], summaries: Mapping[str, Mapping[str, Any]], error: str | None
) -> Path:
    """Add a job to its sweep's table, and return the table's path.

    `settings`: Hydra's own configuration (`HydraConfig.get()`). `overrides`: the job's, as `key=value`. `summaries`:
    what the stages `benchmark` and `verify` returned, where they were asked for; `verify` also where it refused.
    """
    folder = Path(str(settings.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".table.lock"):  # a launcher may run jobs at the same time
        jobs = _read(folder / RECORD)
        number = int(settings.job.num)
        jobs = [job for job in jobs if job["number"] != number]
        jobs.append(
            {
                "number": number,
                "overrides": dict(_split(item) for item in overrides),
                "error": error,
                "verify": summaries.get("verify"),
                **_kept(summaries.get("benchmark")),
            }
        )
        jobs.sort(key=lambda job: int(job["number"]))
        _write(folder / RECORD, json.dumps(jobs, indent=1))
        _write(folder / TABLE, markdown(jobs))
        if any(job["backends"] for job in jobs):
            _plot(jobs, folder)
    return folder / TABLE


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _kept(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    if summary is None:
        return {"point": {}, "backends": {}, "session_ratios": {}, "device": None, "precision": None}
    kept = {key: summary[key] for key in ("point", "backends", "session_ratios", "precision")}
    return {**kept, "device": summary["machine"]["device"]}


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
    """The table's header: what varies, what verify found, seconds of every setup that was measured, the ratios, the
    error if any.
    """
    found = dict.fromkeys(name for job in jobs for name in _proved(job))
    backends = [name for name in BACKENDS if any(name in job["backends"] for job in jobs)]
    ratios = ["x torch_cache", "x two_files", "last/first", "session ratio"] if OURS in backends else []
    errors = ["error"] if any(job["error"] for job in jobs) else []
    return [*varying(jobs), *found, *(f"{name} (s)" for name in backends), *ratios, *errors]


def rows(jobs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a job, in the order of `columns`."""
    names = columns(jobs)
    return [[_cell(job, name) for name in names] for job in jobs]


def _cell(job: Mapping[str, Any], column: str) -> str:
    ours = job["backends"].get(OURS, {})
    ratio = {
        "x torch_cache": ours.get("vs_torch_cache"),
        "x two_files": ours.get("vs_two_files"),
        "last/first": ours.get("last_over_first"),
        "session ratio": job["session_ratios"].get(footprint.SESSION),
    }
    if column in ratio:
        value = ratio[column]
        return ABSENT if value is None else f"{value:.2f}"
    if column in (found := _proved(job)):
        return found[column]
    if column == "error":
        return shorten(str(job["error"] or ""), LONGEST, placeholder=" ...")
    if column.endswith(" (s)") and (name := column.removesuffix(" (s)")) in BACKENDS:
        return _time(name, job["backends"][name]) if name in job["backends"] else ABSENT
    return str(job["overrides"].get(column, ABSENT))


def _proved(job: Mapping[str, Any]) -> dict[str, str]:
    """Column -> cell of what verify found, whether it passed the candidate or not."""
    verify = job["verify"]
    if verify is None:
        return {}
    worst = verify["worst_logits"]
    cells = {
        "passed": f"{'yes' if verify['passed'] else 'no'}, {verify['arithmetic']}",
        **{f"{name} as PyTorch": f"{share:.1%}" for name, share in verify["identical"].items()},
        "logits off by": "not finite" if worst is None else f"{worst:.1e}",
    }
    for name, ours in verify["metrics"].get("ours", {}).items():
        cells[name.replace("_", " ")] = f"{ours:.2f}% ({verify['metrics']['pytorch'][name]:.2f}%)"
    cells |= {
        "nodes in FP32": str(verify["fp32_nodes"]),
        "casts": str(verify["casts"]),
        "decoder MB": f"{verify['decoder_bytes'] / 1e6:.1f}",
    }
    if (speed := verify["speed"]) is not None:
        figures = next(figures for name, figures in speed["backends"].items() if name != BASELINE)
        cells |= {"seconds": f"{figures['seconds']['median']:.3f}", "x PyTorch": f"{speed['ratio']:.2f}"}
    return cells


def _time(name: str, values: Mapping[str, Any]) -> str:
    missed = BACKENDS[name].compiled and not values["compiled"]  # transformers' beam search isn't
    return f"{values['total']['median']:.3f}{' (not compiled)' if missed else ''}"


def markdown(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The table, and above it what all jobs have in common."""
    names = columns(jobs)
    changing = varying(jobs)
    common = {key: value for job in jobs for key, value in job["overrides"].items() if key not in changing}
    given = " ".join(f"`{key}={value}`" for key, value in common.items())
    lines = [f"In all jobs: {given}", ""] if common else []
    lines += [f"On {where}.", ""] if (where := label(jobs)) else []
    for cells in (names, ["---"] * len(names), *rows(jobs)):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if any(job["verify"] for job in jobs):
        lines += ["", "Metrics: in brackets PyTorch's in FP32. Logits: the worst difference along what PyTorch said."]
    if not any(job["backends"] for job in jobs):
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"Seconds are medians; ratios are {OURS} against {BASELINE} and against {SEPARATE}, of the same job. "
        f"last/first: latency of the last tenth of the tokens of {OURS} over that of the first.",
    ]
    return "\n".join(lines) + "\n"


def label(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Device and precision of the jobs that were measured."""
    return "; ".join(dict.fromkeys(f"{job['device']}, {job['precision']}" for job in jobs if job["backends"]))


def _plot(jobs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Seconds and milliseconds a token over new tokens, and the speed-up as a grid: whatever else varies, a panel."""
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

    others = [key for key in varying(jobs) if key != LENGTH]
    lines, fields = [], []
    for job in jobs:
        panel = ", ".join(f"{key.rsplit('.', 1)[-1]}={job['overrides'].get(key, ABSENT)}" for key in others)
        place = {"new tokens": job["point"].get("new_tokens"), "jobs": panel}
        for name in (name for name in BACKENDS if name in job["backends"]):
            values = job["backends"][name]
            figures = {"total (s)": values["total"]["median"], "ms a token": values["ms_per_token"]}
            lines.append({**place, **figures, "backend": name})
        if (ratio := job["backends"].get(OURS, {}).get("vs_torch_cache")) is not None:
            fields.append({**place, "ratio": ratio})
    title = label(jobs)
    for file, y in ((TOTALS, "total (s)"), (PER_TOKEN, "ms a token")):
        plots.sweep(lines, "new tokens", y, "backend", "jobs", title, folder / file)
    if fields:
        what = f"{BASELINE} takes so many times as long as {OURS}"
        plots.grid(fields, "new tokens", "jobs", "ratio", f"{what}\n{title}", folder / SPEED_UP)
