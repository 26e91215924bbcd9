"""Bounds of numbers, declared beside the fields that they belong to, and the check of a section against them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from accel.errors import AccelError

LARGEST = 1_000_000  # tokens, sequences or repeats; a larger number is a typing error
LARGEST_SEED = 2**32 - 1  # of numpy's generators
BOUNDS = "bounds"  # key of a field's metadata


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest number that a field may have, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


def number(default: Any, low: float = 1, high: float = LARGEST) -> Any:
    """Return a dataclass field that holds a number, or None if its type allows that, within bounds."""
    return field(default=default, metadata={BOUNDS: Bounds(low, high)})


def numbers(low: float = 1, high: float = LARGEST) -> Any:
    """Return a dataclass field that holds a list of numbers, each within bounds; empty by default."""
    return field(default_factory=list, metadata={BOUNDS: Bounds(low, high)})


def seed() -> Any:
    """Return a dataclass field that holds a seed; 0 by default."""
    return number(0, 0, LARGEST_SEED)


def check(section: Any, name: str = "") -> None:
    """Check every number of a section, and of the sections in it.

    Args:
        section: Dataclass whose fields were declared with `number`, `numbers` or `seed`.
        name: Key of the section, for the message; empty for the whole configuration.

    Raises:
        AccelError: A number is out of bounds, or is no number (NaN).
    """
    for item in fields(section):
        key = f"{name}.{item.name}" if name else item.name
        value = getattr(section, item.name)
        if is_dataclass(value):
            check(value, key)
        bounds = item.metadata.get(BOUNDS)
        if bounds is None or value is None:
            continue
        for element in _elements(value):
            if not bounds.low <= element <= bounds.high:  # NaN is within no bounds
                where = "each number must be" if isinstance(value, list) else "must be"
                raise AccelError(f"{key}={value}: {where} {bounds}")


def _elements(value: Any) -> Iterator[Any]:
    """Yield the numbers of a list, or the number itself."""
    if isinstance(value, list):
        yield from value
    else:
        yield value
