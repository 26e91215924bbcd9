"""SHA-256 of files, remembered from one process to the next as long as a file's state is the same."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accel.system.user_cache import read_values, write_values

FILE = "hashes.json"
MAX_ENTRIES = 4096  # the newest ones are kept


def file_hashes(paths: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, in hexadecimal, hashing only those whose state isn't known.

    A state is device, inode, size and the times of the last changes of content and of status. The time of the status is
    set by the system alone, so that a change of content shows even if the time of modification was set back.
    """
    remembered: dict[str, str] = read_values(FILE)
    states = {path: _state(path) for path in paths}
    unknown = [path for path in paths if states[path] not in remembered]
    if unknown:
        computed = hash_files(unknown)
        remembered |= {states[path]: sha256 for path, sha256 in computed.items()}
        write_values(FILE, remembered, MAX_ENTRIES)
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
