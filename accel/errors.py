"""The one exception that means "the user can fix this": printed as a message, never as a traceback."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

MOST = 24  # choices listed in one message


class AccelError(Exception):
    """A mistake in the input. The message names the value and, where there are some, the choices."""


class VerificationError(AccelError):
    """A candidate that `verify` doesn't pass. `found`: the summary it would have had as an artifact, as JSON."""

    def __init__(self, message: str, found: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.found = found


class DeviceMemoryError(AccelError):
    """A device has no room for what was asked of it. What was loaded before stays usable."""


def unknown(kind: str, value: object, choices: Iterable[str]) -> AccelError:
    """The error for a name that doesn't exist: says which, lists what does, and points at the nearest."""
    ordered = sorted(choices)
    near = get_close_matches(str(value), ordered, n=MOST, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if get_close_matches(str(value), ordered, n=1) else ""
    if len(ordered) > MOST:
        return AccelError(f"unknown {kind}: {value!r}.{hint} {len(ordered)} choices, among them: {', '.join(near)}")
    return AccelError(f"unknown {kind}: {value!r}.{hint} Choices: {', '.join(ordered)}")
