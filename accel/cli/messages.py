"""Messages for the errors that a user can cause, including those of Hydra and the operating system."""

import re
import shlex
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from accel.config.schema import Config
from accel.errors import AccelError, summarize, unknown

USER_ERRORS = (AccelError, HydraException, OmegaConfBaseException, OSError)


def explain(error: Exception) -> str:
    """Return the message for an error: what is wrong, the value found, and the choices.

    Args:
        error: One of `USER_ERRORS`.
    """
    if isinstance(error, AccelError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown(group or "config", name, error.options))
    if isinstance(error, OverrideParseException):
        return _quoting_advice(error)
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__ or error
        key = re.search(r"Could not override '([^']+)'", str(error))
        if key is not None and "not in" in str(cause) and key[1] not in _keys_near(key[1]):
            return str(unknown("config key", key[1], _keys_near(key[1])))
        override = str(error).splitlines()[0].removeprefix("Error merging override ")
        return f"{override}: {str(cause).splitlines()[0]}"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the configuration'}: {str(error).splitlines()[0]}"
    return summarize(error) if isinstance(error, OSError) else str(error)


def _quoting_advice(error: OverrideParseException) -> str:
    """Return the message for an override that Hydra can't parse, with the quoted form to type in a shell."""
    key, _, value = str(error.override).partition("=")
    inner = value.replace("\\", "\\\\").replace('"', '\\"')
    reason = str(error).splitlines()[0]
    quoted = shlex.quote(f'{key}="{inner}"')
    return f"can't read {error.override!r}: {reason}\nPut values with special characters in quotes: {quoted}"


def _keys_near(key: str) -> list[str]:
    """Return the keys of the innermost section of `key` that exists, with the section's name in front."""
    prefix = ""
    section: Any = Config
    for part in key.lstrip("+~").split("."):
        types = {field.name: field.type for field in fields(section)}
        if part not in types or not is_dataclass(types[part]):
            break
        prefix, section = f"{prefix}{part}.", types[part]
    return [f"{prefix}{field.name}" for field in fields(section)]
