"""Folder of files that only save time: they may be deleted at any moment, and nothing in them is executed."""

import logging
import os
from pathlib import Path

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
