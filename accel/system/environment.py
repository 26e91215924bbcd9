"""Facts about the machine and the command that a measurement depends on."""

import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from accel.system.hashing import DISTRIBUTION


def machine(device: str, threads: int) -> dict[str, Any]:
    """Describe the machine: processor, device, driver and threads, as JSON.

    Args:
        device: torch's name of the device.
        threads: Configured number of threads; 0 for torch's default, which is then given instead.
    """
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


@cache
def _driver() -> str:
    """Return the version of NVIDIA's driver, as `nvidia-smi` reports it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    # S603: a fixed command without a shell and without any input from outside
    versions = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    return versions[0] if versions else "unknown"


@cache
def commit() -> str | None:
    """Return the git commit of accel's source, or None if it is unknown.

    It is read from the checkout that accel runs from, or from pip's record of an installation from a repository.
    """
    package = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is not None and (package.parent / ".git").exists():
        query = [git, "-C", str(package.parent), "rev-parse", "HEAD"]
        # S603: a fixed command without a shell; the only argument that varies is the folder of this package
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None  # noqa: S603
    try:
        record = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    commit_id: str | None = json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
    return commit_id


def command(arguments: Sequence[str]) -> str | None:
    """Return the command line that started this process, to be repeated on another machine.

    The folders of artifacts and of Hydra's output are left out; other absolute paths are cut to their last part.

    Args:
        arguments: `sys.argv`.

    Returns:
        The command line, or None if the process isn't accel's command.
    """
    program, *overrides = arguments
    if Path(program).name not in ("accel", "accel.exe", "__main__.py"):
        return None
    portable = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "artifacts" or key.startswith(("hydra.run.dir", "hydra.sweep.dir")):
            continue
        path = Path(value.strip("'\"")).expanduser()
        portable.append(f"{key}={path.name}" if equals and path.is_absolute() else override)
    return shlex.join(["python", "-m", "accel", *portable])


def _processor() -> str:
    """Return the processor's model name; on Linux, that of `/proc/cpuinfo`."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
