"""Hashes of files and of values, by which artifacts are named."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DISTRIBUTION = "accel-onnx"  # name of this package for pip

_hashes: dict[tuple[int, int, int, int], str] = {}


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    It is computed once per process and state of the file: device, inode, size and time of modification. So a file that
    was moved isn't read again.
    """
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if state not in _hashes:
        with path.open("rb") as file:
            _hashes[state] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[state]


def make_key(**parts: Any) -> str:
    """Return the SHA-256 of named values, in hexadecimal. They must be JSON; their order doesn't matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package, or `absent`."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
