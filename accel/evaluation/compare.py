"""How far tensors are apart, where anything looks at them."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor

from accel.adapters.types import Component


@dataclass
class Difference:
    """How far one output is from float64, at the token where it is furthest, or furthest beyond what is allowed.

    All numbers are relative to the output's largest magnitude. `torch_error`: PyTorch's own error there, in the
    same precision; None where it is not finite or not known. `location`: the inputs, row and token.
    """

    error: float = 0.0
    torch_error: float | None = None
    allowed: float = 0.0
    location: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # not so for NaN

    @property
    def rank(self) -> tuple[bool, float]:
        """Larger for what is further: beyond what is allowed, or else from float64."""
        return (not self.passed, self.error if self.passed else self.used)

    @property
    def used(self) -> float:
        """The share of what is allowed that the error takes; infinite for NaN."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Largest absolute difference of every token: [rows, ..., tokens, features] -> [rows, tokens], in float64."""
    apart = (found.cpu().double() - expected.cpu().double()).abs()
    if not apart.numel():
        return apart.new_zeros(apart.shape[0], apart.shape[-2])
    return apart.amax(tuple(axis for axis in range(1, apart.ndim) if axis != apart.ndim - 2))


def error(found: Tensor, expected: Tensor, shown: Tensor | None = None) -> float:
    """Root of the mean square of the difference over that of the expected values, where `shown` is not 0."""
    found = found.cpu().float()
    if shown is not None:
        shown = over_tokens(shown, expected)
        found, expected = found * shown, expected * shown
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def over_tokens(shown: Tensor, value: Tensor) -> Tensor:
    """A mask [rows, tokens] that broadcasts with `value` [rows, ..., tokens, features]."""
    return shown.view(len(shown), *[1] * (value.ndim - 3), -1, 1)


def visible(
    component: Component, name: str, given: Mapping[str, Tensor], value: Tensor, growing: Container[str]
) -> Tensor | None:
    """A mask [rows, tokens] of output `name` of `role`, 0 where it belongs to padding: nothing ever looks there.

    What attends to padding alone averages over nothing, which any rounding changes. What is not finite there counts
    all the same, for it would spread. `given`: the role's inputs; `growing`: the outputs that are caches of the
    decoder's own keys and values.
    """
    mask = given.get("attention_mask")  # [batch, source], or [batch, past + new] of a decoder
    if mask is None or not (component is Component.ENCODER or name == "logits" or name in growing):
        return None
    return mask[:, -value.shape[-2] :]
