"""One token of a generation as one CUDA graph: decode step, selection of the next ids, and inputs of the next step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.layout import MASK, POSITION, POSITION_IDS
from accel.runtime.protocol import Selection

MAX_TOKEN_GRAPHS = 4  # decoding methods whose graphs are kept with decode buffers


@dataclass(frozen=True)
class TokenGraph:
    """A selection over tensors of its own, and the call that decodes and selects one token.

    Attributes:
        selection: The selection; its `next_ids` are the step's input.
        run: The call: see `decode_token`.
    """

    selection: Any
    run: CudaGraphCallable


def decode_token(
    step: Callable[[], None],
    inputs: Mapping[str, Tensor],
    logits: Tensor,
    reorder: Callable[[Tensor, Tensor], None],
    selection: Selection,
) -> None:
    """Decode one token, the same for all rows: a sequence of operations without a value of the host that changes.

    Args:
        step: Runs the decode graph.
        inputs: Its inputs besides caches and constants. They are this token's, except the mask of the token itself,
            and become the next token's.
        logits: Its output, [B, 1, vocabulary].
        reorder: Reorders the caches, given the source row of every row [B] and the number of tokens in them [1].
        selection: Selects from the logits, and writes the ids to where the graph reads them.
    """
    position = inputs[POSITION]  # [B], or a scalar in graphs of earlier versions
    length = position.view(-1)[:1]
    if selection.parents is not None:
        reorder(selection.parents, length)
    if MASK in inputs:
        inputs[MASK].index_fill_(1, length, 1)
    step()
    selection.select(logits)
    position += 1
    if POSITION_IDS in inputs:
        inputs[POSITION_IDS].add_(1)
