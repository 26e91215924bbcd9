"""Bounds of numbers and choices of names, declared beside their fields, and the check of a section against them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from accel.errors import AccelError, unknown

LARGEST = 1_000_000  # tokens, sequences or repeats; a larger number is a typing error
LARGEST_SEED = 2**32 - 1  # of numpy's generators
BOUNDS, CHOICES = "bounds", "choices"  # keys of a field's metadata


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


def choice(default: str, choices: tuple[str, ...]) -> Any:
    """Return a dataclass field that holds one of several names."""
    return field(default=default, metadata={CHOICES: choices})


def seed() -> Any:
    """Return a dataclass field that holds a seed; 0 by default."""
    return number(0, 0, LARGEST_SEED)


def check(section: Any, name: str = "") -> None:
    """Check every value of a section, and of the sections in it.

    Args:
        section: Dataclass whose fields were declared with `number`, `numbers`, `seed` or `choice`.
        name: Key of the section, for the message; empty for the whole configuration.

    Raises:
        AccelError: A number is out of bounds, infinite or NaN, a name is none of its choices, or a list has an element
            of another type.
    """
    types = get_type_hints(type(section))
    for item in fields(section):
        key = f"{name}.{item.name}" if name else item.name
        value = getattr(section, item.name)
        if is_dataclass(value):
            check(value, key)
            continue
        _check_finite(key, value)
        container = get_origin(types[item.name])
        if container in (list, dict) and not isinstance(
            value, container
        ):  # OmegaConf passes on what `${...}` stands for
            raise AccelError(f"{key}={value}: must be a {container.__name__}")
        if container is list:
            _check_types(key, value, get_args(types[item.name])[0])
        choices = item.metadata.get(CHOICES)
        if choices is not None and value not in choices:
            raise unknown(key, value, choices)
        bounds = item.metadata.get(BOUNDS)
        for element in _elements(value):
            if bounds is not None and not bounds.low <= element <= bounds.high:
                where = "each number must be" if isinstance(value, list) else "must be"
                raise AccelError(f"{key}={value}: {where} {bounds}")


def _check_finite(key: str, value: Any) -> None:
    """Raise `AccelError` on an infinite number or NaN in nested lists and dictionaries."""
    if isinstance(value, dict):
        for name, element in value.items():
            _check_finite(f"{key}.{name}", element)
        return
    for element in _elements(value):
        if isinstance(element, float) and not math.isfinite(element):
            raise AccelError(f"{key}={value}: {element} is no number that can be used")


def _check_types(key: str, values: list[Any], expected: type) -> None:
    """Raise `AccelError` on an element of another type: OmegaConf accepts lists and dictionaries within a list."""
    for value in values:
        if not isinstance(value, expected):
            raise AccelError(f"{key}={values}: each element must be of type {expected.__name__}, and {value!r} is not")


def _elements(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists and dictionaries, or the value itself; nothing for None."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for element in value:
            yield from _elements(element)
    elif value is not None:
        yield value
