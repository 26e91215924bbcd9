"""How far tensors are apart, where anything looks at them."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor

from accel.adapter import Role


@dataclass
class Difference:
    """Largest absolute difference of two tensors, and relative to the expected one's largest value."""

    absolute: float = 0.0
    relative: float = 0.0

    def widen(self, other: "Difference") -> None:
        """Take the larger of each. NaN counts as larger than anything."""
        self.absolute = other.absolute if not other.absolute <= self.absolute else self.absolute
        self.relative = other.relative if not other.relative <= self.relative else self.relative


def difference(found: Tensor, expected: Tensor, visible: Tensor | None = None) -> Difference:
    """Of two tensors of one shape, where `visible`, which broadcasts with them, is not 0."""
    found = found.cpu().float()
    if visible is not None:
        found, expected = found * visible, expected * visible
    absolute = float((found - expected).abs().max())
    return Difference(absolute, absolute / max(float(expected.abs().max()), 1e-6))


def error(found: Tensor, expected: Tensor, visible: Tensor | None = None) -> float:
    """Root of the mean square of the difference over that of the expected values, where `visible` is not 0."""
    found = found.cpu().float()
    if visible is not None:
        found, expected = found * visible, expected * visible
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def visible(
    role: Role, name: str, given: Mapping[str, Tensor], value: Tensor, growing: Container[str]
) -> Tensor | None:
    """A mask that broadcasts with output `name` of `role`, 0 where it belongs to padding: nothing ever looks there.

    What attends to padding alone averages over nothing, which any rounding changes. What is not finite there counts
    all the same, for it would spread. `given`: the role's inputs; `growing`: the outputs that are caches of the
    decoder's own keys and values.
    """
    mask = given.get("attention_mask")  # [batch, source], or [batch, past + new] of a decoder
    if mask is None:
        return None
    if role is Role.ENCODER:
        return mask.reshape(*mask.shape, *[1] * (value.ndim - 2))  # value: [B, S, ...]
    if name == "logits":
        return mask[:, -value.shape[1] :, None]  # value: [B, N, V]
    return mask[:, None, :, None] if name in growing else None  # value: [B, H, P + T, K]
