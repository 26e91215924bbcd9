"""Elementwise arithmetic, activations and casts. Shapes broadcast as in numpy, and so as in torch."""

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.dtypes import DTYPES
from accel.engine.registry import MICROSOFT, operator, unsupported


@operator("Add")
def add(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b."""
    return a + b


@operator("Sub")
def subtract(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b."""
    return a - b


@operator("Mul")
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a * b."""
    return a * b


@operator("Div")
def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b; of integers, rounded towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Return the remainder of a / b for integers, which has the sign of b."""
    if fmod:
        raise unsupported("fmod", fmod, "0")
    return torch.remainder(a, b)


@operator("Pow")
def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return base ** exponent, in the dtype of `base`."""
    return torch.pow(base, exponent).to(base.dtype)


@operator("Neg")
def negate(x: Tensor) -> Tensor:
    """Return -x."""
    return -x


@operator("Max")
def maximum(*values: Tensor) -> Tensor:
    """Return the elementwise maximum of one or more tensors; NaN where one is NaN."""
    return reduce(torch.maximum, values)


@operator("Min")
def minimum(*values: Tensor) -> Tensor:
    """Return the elementwise minimum of one or more tensors; NaN where one is NaN."""
    return reduce(torch.minimum, values)


@operator("Sin")
def sine(x: Tensor) -> Tensor:
    """Return the sine, of radians."""
    return torch.sin(x)


@operator("Cos")
def cosine(x: Tensor) -> Tensor:
    """Return the cosine, of radians."""
    return torch.cos(x)


@operator("Tanh")
def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent."""
    return torch.tanh(x)


@operator("Sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


@operator("QuickGelu", MICROSOFT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """Return x / (1 + exp(-alpha * x))."""
    return x * torch.sigmoid(alpha * x)


@operator("Relu")
def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return torch.relu(x)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return x * Phi(x), Phi being the normal distribution, or its approximation by `tanh`."""
    if approximate not in ("none", "tanh"):
        raise unsupported("approximate", approximate, "'none' and 'tanh'")
    return functional.gelu(x, approximate=approximate)


@operator("Cast")
def cast(x: Tensor, *, to: int) -> Tensor:
    """Return x in the dtype of number `to` in onnx.TensorProto.DataType. What is too large for a float is infinite."""
    if to not in DTYPES:
        raise unsupported("to", to, f"the dtypes {sorted(DTYPES)}")
    return x.to(DTYPES[to])
