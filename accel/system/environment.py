"""What a measurement depends on beside the configuration."""

import importlib.metadata
import json
import platform
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from accel.system.hashing import DISTRIBUTION


def machine(device: str, threads: int) -> dict[str, Any]:
    """Processor, device, driver and threads, as JSON. `threads`: 0 for as many as torch takes."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": threads or torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def copy_bandwidth(device: torch.device, size: int = 1 << 30, repeats: int = 20) -> float:
    """Bytes a second that a copy within a GPU's memory reads and writes together; the median of `repeats` copies."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * size / float(statistics.median(seconds))


@cache
def _driver() -> str:
    """Version of NVIDIA's driver, as its own tool says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


@cache
def commit() -> str | None:
    """The commit of accel's own source: of its checkout, or as pip notes it for what it installs from a repository."""
    package = Path(__file__).parents[1]
    if (package.parent / ".git").exists() and (git := shutil.which("git")) is not None:
        asked = [git, "-C", str(package.parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
    try:
        noted = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    found: str | None = json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
    return found


def command(arguments: Sequence[str]) -> str | None:
    """The command line that began this process, to be repeated elsewhere; None if it wasn't accel's own.

    `arguments`: `sys.argv`. Where artifacts and tables lie is left out, other folders are cut to their last part.
    """
    program, *given = arguments
    if Path(program).name not in ("accel", "accel.exe", "__main__.py"):
        return None
    kept = []
    for argument in given:
        key, equals, value = argument.partition("=")
        if key == "artifacts" or key.startswith(("hydra.run.dir", "hydra.sweep.dir")):
            continue
        path = Path(value.strip("'\"")).expanduser()
        kept.append(f"{key}={path.name}" if equals and path.is_absolute() else argument)
    return shlex.join(["python", "-m", "accel", *kept])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
