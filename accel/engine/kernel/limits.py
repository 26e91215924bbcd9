"""What the kernel can't run, whatever the tensors: too many rows, and weights of another size than 16 bits."""

from collections.abc import Sequence

import torch

from accel.engine.kernel.placement import NotRunnableError
from accel.engine.nodes import Node
from accel.engine.operations import product
from accel.engine.planning.plan import Plan

MAX_ROWS = 8  # rows of the batch that the kernel was run with; its products hold no more than 16


def check_rows(rows: int) -> None:
    """Raise `NotRunnableError` if the kernel can't decode so many rows at once."""
    if rows > MAX_ROWS:
        raise NotRunnableError(f"{rows} sequences at once, beams counted: the kernel decodes up to {MAX_ROWS}")


def weights_dtype(plan: Plan, fused: Sequence[Node]) -> torch.dtype:
    """Return the dtype of the weights of the fused operations.

    Raises:
        NotRunnableError: There are several, or it is none of 16 bits.
    """
    constants = plan.graph.constants
    products = [node for node in fused if isinstance(node.attributes["spec"], product.Product)]
    read = {name for node in products for name in node.inputs if name in constants}
    dtypes = {constants[name].dtype for name in read if constants[name].ndim == 2 and min(constants[name].shape) > 1}
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        found = ", ".join(sorted(map(str, dtypes))) or "no dtype"
        raise NotRunnableError(f"weights are of {found}, and the kernel needs one of 16 bits")
    return dtypes.pop()
