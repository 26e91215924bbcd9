"""Folder of files that only save time: they may be deleted at any moment, and nothing in them is executed."""

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PRIVATE = 0o700


def user_cache() -> Path | None:
    """Return accel's folder in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`), made if need be.

    Returns:
        The folder, which only this user can read and write; None if there can be none, or if another user owns it or
        may write into it: what such a user puts there must not be believed.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "accel"
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        logger.debug("no cache folder: %s", error)
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        logger.debug("%s is not used: another user owns it or may write into it", folder)
        return None
    return folder


def read_values(name: str) -> dict[str, Any]:
    """Return the values that `write_values` wrote to a JSON file; none where there is no such file or it is damaged."""
    folder = user_cache()
    try:
        values: Any = json.loads((folder / name).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_values(name: str, values: dict[str, Any], entries: int) -> None:
    """Replace a JSON file at once, so that another process reads the old or the new one. A failure only costs time.

    Args:
        name: Name of the file.
        values: The values, the newest at the end.
        entries: The most of them that are kept.
    """
    folder = user_cache()
    if folder is None:
        return
    newest = dict(list(values.items())[-entries:])
    temporary = folder / f"{name}.tmp{os.getpid()}"
    try:
        temporary.write_text(json.dumps(newest), encoding="utf-8")
        temporary.replace(folder / name)
    except OSError:
        temporary.unlink(missing_ok=True)
