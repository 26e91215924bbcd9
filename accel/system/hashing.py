"""Hashes of files and of values: what names an artifact."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DISTRIBUTION = "accel-onnx"  # the name that pip knows this package by

_hashes: dict[tuple[int, int, int, int], str] = {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as hex. Computed once per process for each state of the file, wherever it moves."""
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if state not in _hashes:
        with path.open("rb") as file:
            _hashes[state] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[state]


def make_key(**parts: Any) -> str:
    """SHA-256 over named parts, as hex. The parts must be JSON; their order does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed version of each package; `absent` where there is none."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    return {package: version(package) for package in packages}
