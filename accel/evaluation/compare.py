"""Error measures: how far an output is from a reference, at the tokens that are not padding."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.adapters.types import Component

VALUES_AT_ONCE = 2**17  # whose differences are computed in float64: a megabyte, which stays in the processor's cache


@dataclass
class Difference:
    """Error of one output against float64, at its worst token.

    Numbers are relative to the output's largest magnitude.

    Attributes:
        error: Largest absolute error of that token.
        torch_error: PyTorch's own error there, in the same precision; None where it is not finite or not known.
        allowed: Largest error that passes there.
        location: Inputs, row and token.
    """

    error: float = 0.0
    torch_error: float | None = None
    allowed: float = 0.0
    location: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is allowed; False for NaN."""
        return self.error <= self.allowed

    @property
    def rank(self) -> tuple[bool, float]:
        """Return a key that sorts failures after passes, passes by error, failures by share of the allowed error."""
        return (not self.passed, self.error if self.passed else self.used)

    @property
    def used(self) -> float:
        """Return the error over the allowed error; infinite for NaN."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return the largest absolute difference of every token, in float64.

    Args:
        found: Values under test, [rows, ..., tokens, features].
        expected: Values to compare with, same shape.

    Returns:
        Errors, [rows, tokens].
    """
    found, expected = found.cpu(), expected.cpu()
    rows, tokens = expected.shape[0], expected.shape[-2]
    errors = torch.zeros(rows, tokens, dtype=torch.float64)
    if not expected.numel():
        return errors
    at_once = max(1, VALUES_AT_ONCE * rows * tokens // expected.numel())  # tokens
    for row in range(rows):
        for start in range(0, tokens, at_once):
            block = (row, ..., slice(start, start + at_once), slice(None))
            differences = torch.sub(found[block], expected[block].double()).abs_()  # [..., tokens, features]
            errors[row, start : start + at_once] = differences.movedim(-2, 0).flatten(1).amax(1)
    return errors


def magnitude(values: Tensor) -> float:
    """Return the largest magnitude, or NaN if there is one. Unlike `values.abs()`, takes no memory."""
    low, high = values.aminmax()
    return max(-float(low), float(high))


def error(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Return the root mean square of the difference over that of the expected values.

    Args:
        found: Values under test, [rows, ..., tokens, features].
        expected: Values to compare with, same shape.
        mask: Tokens that count, [rows, tokens], 0 or 1; None counts all.
    """
    found = found.cpu().float()
    if mask is not None:
        broadcastable = over_tokens(mask, expected)
        found, expected = found * broadcastable, expected * broadcastable
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def over_tokens(mask: Tensor, value: Tensor) -> Tensor:
    """Reshape a mask [rows, tokens] so that it broadcasts with `value` [rows, ..., tokens, features]."""
    middle_axes = [1] * (value.ndim - 3)
    return mask.view(len(mask), *middle_axes, -1, 1)


def output_mask(
    component: Component,
    name: str,
    inputs: Mapping[str, Tensor],
    value: Tensor,
    self_attention_caches: Container[str],
) -> Tensor | None:
    """Return a mask that is 0 at the tokens of an output that belong to padding, whose values nothing reads.

    A padding token attends to padding alone, so its values are an average over nothing, which any rounding changes.
    The caller should still reject values there that are not finite, because those spread.

    Args:
        component: Component that made the output.
        name: Name of the output.
        inputs: Inputs of the component.
        value: The output, [rows, ..., tokens, features].
        self_attention_caches: Names of the outputs that are caches of the decoder's own keys and values.

    Returns:
        Mask, [rows, tokens]; None where every token counts.
    """
    mask = inputs.get("attention_mask")  # [batch, source], or [batch, past + new] of a decoder
    if mask is None:
        return None
    if component is Component.ENCODER or name == "logits" or name in self_attention_caches:
        return mask[:, -value.shape[-2] :]
    return None
