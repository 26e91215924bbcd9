"""The peers' virtual environment: pinned packages, a group for each library, installed once."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.peers.libraries import last_line

BASE = "transformers"
# Versions that were seen to work together. Optimum Intel also asks for torchvision, which nothing here needs, and which
# fails beside a CPU build of torch: so it is installed without its dependencies, which are listed instead.
PACKAGES: dict[str, tuple[str, ...]] = {
    BASE: ("torch==2.13.0", "transformers==5.5.4", "numpy==2.4.6"),
    "openvino": (
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "optimum==2.3.0",
        "nncf==3.4.0",
        "requests==2.34.2",
    ),
    "ctranslate2": ("ctranslate2==4.8.5",),
    "onnxruntime-genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0"),  # built from source: needs cmake and a C++ compiler
}
WITHOUT_DEPENDENCIES: dict[str, tuple[str, ...]] = {"openvino": ("optimum-intel==2.2.0",)}
STAMP = "installed.json"

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command, and return its status and output."""
    # S603: commands of this file over a folder that the user named
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def python_of(folder: Path) -> Path:
    """Return the interpreter of the environment in `folder`."""
    return folder / "environment" / "bin" / "python"


def install(
    folder: Path,
    libraries: Sequence[str],
    run: Run = run_command,
    packages: Mapping[str, tuple[str, ...]] = PACKAGES,
) -> Mapping[str, str]:
    """Make the environment in `folder`, or complete it.

    A library that is there with these versions isn't installed again. One that can't be installed leaves the others
    usable, and is tried again by the next call.

    Args:
        folder: The user's folder for everything that the comparison keeps.
        libraries: Names in `packages`.
        run: Runs a command.
        packages: Library -> its packages; `BASE`, which all need, is one of them.

    Returns:
        Library that couldn't be installed -> the reason, in one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    python, stamp = python_of(folder), folder / STAMP
    done: dict[str, str] = json.loads(stamp.read_text()) if stamp.exists() and python.exists() else {}
    if not python.exists():
        made = run([sys.executable, "-m", "venv", str(folder / "environment")])
        if made.returncode:
            return dict.fromkeys(libraries, last_line(made.stderr))
    failed: dict[str, str] = {}
    for library in (BASE, *(name for name in libraries if name != BASE)):
        if done.get(library) == _digest(packages[library], library):
            continue
        reason = _install_library(folder, library, run, packages)
        if reason is None:
            done[library] = _digest(packages[library], library)
            stamp.write_text(json.dumps(done, indent=1))
        else:
            failed[library] = reason
    return dict.fromkeys(libraries, failed[BASE]) if BASE in failed else failed


def _install_library(folder: Path, library: str, run: Run, packages: Mapping[str, tuple[str, ...]]) -> str | None:
    """Install the packages of one library. Return None, or why that failed."""
    constraints = folder / "constraints.txt"  # the versions of all, so that no library moves another's
    constraints.write_text("\n".join(package for group in packages.values() for package in group))
    pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    print(f"installing {library}: {' '.join(packages[library])}", file=sys.stderr, flush=True)
    commands = [[*pip, *packages[library]]]
    if library in WITHOUT_DEPENDENCIES:
        commands.append([*pip, "--no-deps", *WITHOUT_DEPENDENCIES[library]])
    for command in commands:
        installed = run(command)
        if installed.returncode:
            return f"not installed: {last_line(installed.stderr)}"
    return None


def _digest(packages: Sequence[str], library: str) -> str:
    """Return what a library's installation is remembered by: its packages with their versions, hashed."""
    all_packages = (*packages, *WITHOUT_DEPENDENCIES.get(library, ()))
    return hashlib.sha256("\n".join(all_packages).encode()).hexdigest()
