"""Matrix products. Sums of 16-bit products are accumulated in FP32, as torch does by itself."""

import torch
from torch import Tensor

from accel.engine.registry import MICROSOFT, operator


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, as in numpy."""
    return a @ b


@operator("FusedMatMul", MICROSOFT)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803  (ONNX's names)
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Return alpha * a @ b, with the last two axes of an input exchanged where asked; a vector has none to exchange."""
    product = _turned(a, transA) @ _turned(b, transB)
    return product if alpha == 1 else product * alpha


def _turned(x: Tensor, turn: int) -> Tensor:
    """Return x with its last two axes exchanged if `turn`."""
    return x.mT if turn and x.ndim > 1 else x


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Return alpha * a @ b + beta * c of matrices, transposed where asked; c broadcasts to the product."""
    a, b = _turned(a, transA), _turned(b, transB)
    if c is None:
        return fused_matmul(a, b, alpha=alpha)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)
