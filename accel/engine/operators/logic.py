"""Comparisons, and what is done with their results. Shapes broadcast."""

import torch
from torch import Tensor

from accel.engine.registry import operator


@operator("Equal")
def equal(a: Tensor, b: Tensor) -> Tensor:
    """Return whether a == b."""
    return a == b


@operator("Less")
def less(a: Tensor, b: Tensor) -> Tensor:
    """Return whether a < b."""
    return a < b


@operator("LessOrEqual")
def less_or_equal(a: Tensor, b: Tensor) -> Tensor:
    """Return whether a <= b."""
    return a <= b


@operator("Greater")
def greater(a: Tensor, b: Tensor) -> Tensor:
    """Return whether a > b."""
    return a > b


@operator("And")
def logical_and(a: Tensor, b: Tensor) -> Tensor:
    """Return whether both are true; of booleans."""
    return a & b


@operator("Not")
def logical_not(x: Tensor) -> Tensor:
    """Return whether x is false; of booleans."""
    return ~x


@operator("Where")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return x where the condition is true, else y."""
    return torch.where(condition, x, y)
