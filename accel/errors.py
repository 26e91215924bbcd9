"""Errors that the user can fix. The command line prints their messages, never a traceback."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

MAX_CHOICES = 24  # choices listed in one message


class AccelError(Exception):
    """A mistake in the input. The message names the value and, where there are some, the choices."""


class VerificationError(AccelError):
    """A failed verification of an unverified bundle.

    Attributes:
        summary: The summary that `verify`'s artifact would have had, as JSON.
    """

    def __init__(self, message: str, summary: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


class DeviceMemoryError(AccelError):
    """A device out of memory. Models that were loaded before stay usable."""


class StageError(AccelError):
    """An error that a library raised inside a stage; the original one is its `__cause__`."""


def summarize(error: BaseException) -> str:
    """Return one line that describes an error: file and reason for one of the operating system, else class and message.

    `ValueError` and the like stand for a wrong value, which their message names, so their class is left out.
    """
    if isinstance(error, AccelError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if message and type(error) is ValueError:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def unknown(kind: str, value: object, choices: Iterable[str]) -> AccelError:
    """Return the error for a name that doesn't exist, with the choices and the most similar one.

    Args:
        kind: What the name was expected to be, such as "metric".
        value: The name.
        choices: The names that exist. Of more than `MAX_CHOICES`, the message lists only similar ones.
    """
    names = sorted(choices)
    similar = get_close_matches(str(value), names, n=MAX_CHOICES, cutoff=0.3)
    hint = f" Did you mean {similar[0]}?" if get_close_matches(str(value), names, n=1) else ""
    if len(names) > MAX_CHOICES:
        return AccelError(f"unknown {kind}: {value!r}.{hint} {len(names)} choices, among them: {', '.join(similar)}")
    return AccelError(f"unknown {kind}: {value!r}.{hint} Choices: {', '.join(names)}")
