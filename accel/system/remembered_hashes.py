"""SHA-256 of files, remembered from one process to the next as long as a file's state is the same."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accel.system.user_cache import user_cache

FILE = "hashes.json"
MAX_ENTRIES = 4096  # the newest ones are kept


def file_hashes(paths: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, in hexadecimal, hashing only those whose state isn't known.

    A state is device, inode, size and the times of the last changes of content and of status. The time of the status is
    set by the system alone, so that a change of content shows even if the time of modification was set back.
    """
    remembered = _read()
    states = {path: _state(path) for path in paths}
    unknown = [path for path in paths if states[path] not in remembered]
    if unknown:
        computed = hash_files(unknown)
        remembered |= {states[path]: sha256 for path, sha256 in computed.items()}
        _write(remembered)
    return {path: remembered[states[path]] for path in paths}


def hash_files(paths: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, in hexadecimal, read now."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(_hash, paths), strict=True))


def _hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> str:
    """Return the state of a file as text."""
    status = path.stat()
    return ":".join(map(str, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)))


def _read() -> dict[str, str]:
    """Return state -> hash as remembered; nothing where there is no such file or it is damaged."""
    folder = user_cache()
    try:
        values: Any = json.loads((folder / FILE).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(remembered: dict[str, str]) -> None:
    """Replace the file at once, so that another process reads the old or the new one. A failure only costs time."""
    folder = user_cache()
    if folder is None:
        return
    newest = dict(list(remembered.items())[-MAX_ENTRIES:])
    temporary = folder / f"{FILE}.tmp{os.getpid()}"
    try:
        temporary.write_text(json.dumps(newest), encoding="utf-8")
        temporary.replace(folder / FILE)
    except OSError:
        temporary.unlink(missing_ok=True)
