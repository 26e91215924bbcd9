"""What the kernel can't run, whatever the tensors: too many rows, and weights that it can't read."""

from collections.abc import Sequence

import torch

from accel.engine.kernel.placement import NotRunnableError
from accel.engine.low_bits import LowBits
from accel.engine.nodes import Node
from accel.engine.operations import product
from accel.engine.planning.plan import Plan

MAX_ROWS = 8  # rows of the batch that the kernel was run with; its products hold no more than 16
# Features that share a scale: of 32, four lanes read 8 each; no more than those of a slot.
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048)


def check_rows(rows: int) -> None:
    """Raise `NotRunnableError` if the kernel can't decode so many rows at once."""
    if rows > MAX_ROWS:
        raise NotRunnableError(f"{rows} sequences at once, beams counted: the kernel decodes up to {MAX_ROWS}")


def weights_dtype(plan: Plan, fused: Sequence[Node]) -> torch.dtype:
    """Return the dtype of the weights of the fused operations; of those of few bits, that of their scales.

    Raises:
        NotRunnableError: There are several, or it is none of 16 bits, or a weight is stored in a way that the kernel
            can't read.
    """
    dtypes = set()
    for node in fused:
        spec = node.attributes["spec"]
        if isinstance(spec, product.Product):
            rest = list(node.inputs[1 + spec.norm_weight + spec.norm_bias :])
            for part in spec.parts:
                if part.low_bits is not None:
                    _check_low_bits(part.low_bits)
                for weight in part.take(rest):
                    dtypes.add(plan.graph.constants[weight.scales[0] if weight.scales else weight.matrix].dtype)
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        found = ", ".join(sorted(map(str, dtypes))) or "no dtype"
        raise NotRunnableError(f"weights are of {found}, and the kernel needs one of 16 bits")
    return dtypes.pop()


def _check_low_bits(low: LowBits) -> None:
    """Raise `NotRunnableError` if the kernel can't read weights that are stored so."""
    if low.block not in BLOCKS:
        blocks = ", ".join(map(str, BLOCKS))
        raise NotRunnableError(f"weights are of {low}, and the kernel reads int8 and int4 in blocks of {blocks}")
