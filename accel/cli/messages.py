"""Turns the errors a user can cause, Hydra's and the system's included, into one message."""

import re
import shlex
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from accel.config.schema import Config
from accel.errors import AccelError, unknown

USER_ERRORS = (AccelError, HydraException, OmegaConfBaseException, OSError)


def explain(error: Exception) -> str:
    """What was wrong, with the value and the choices."""
    if isinstance(error, AccelError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown(group or "config", name, error.options))
    if isinstance(error, OverrideParseException):
        return _quoting(error)
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__ or error
        key = re.search(r"Could not override '([^']+)'", str(error))
        if key is not None and "not in" in str(cause):
            return str(unknown("config key", key[1], _keys_near(key[1])))
        return f"{str(error).splitlines()[0]}\n{str(cause).splitlines()[0]}"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return str(error)


def _quoting(error: OverrideParseException) -> str:
    key, _, value = str(error.override).partition("=")
    inner = value.replace("\\", "\\\\").replace('"', '\\"')
    reason = str(error).splitlines()[0]
    quoted = shlex.quote(f'{key}="{inner}"')
    return f"can't read {error.override!r}: {reason}\nText with signs of its own goes in quotes, like this: {quoted}"


def _keys_near(key: str) -> list[str]:
    """The keys of the innermost section of `key` that exists."""
    prefix = ""
    node: Any = Config
    for part in key.lstrip("+~").split("."):
        found = {field.name: field for field in fields(node)}.get(part) if is_dataclass(node) else None
        if found is None or not is_dataclass(found.type):
            break
        prefix, node = f"{prefix}{part}.", found.type
    return [f"{prefix}{field.name}" for field in fields(node)]
