"""Activations of a product, each a function of one number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # https://github.com/hendrycks/GELUs
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softcap": lambda x, limit: limit * torch.tanh(x / limit),  # Gemma 2: https://arxiv.org/abs/2408.00118
}
"""Name -> function of a tensor of any shape, element by element."""


@dataclass(frozen=True)
class Activation:
    """An activation.

    Attributes:
        name: Key of `ACTIVATIONS`.
        limit: Largest magnitude that `softcap` returns; unused by the others.
    """

    name: str = "none"
    limit: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation of every element."""
        function = ACTIVATIONS[self.name]
        return function(x, self.limit) if self.name == "softcap" else function(x)

    def __str__(self) -> str:
        return f"{self.name} {self.limit:g}" if self.name == "softcap" else self.name
