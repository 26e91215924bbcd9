"""One token of a generation as one CUDA graph: decode step, selection of the next ids, and inputs of the next step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.layout import MASK, POSITION, POSITION_IDS

MAX_TOKEN_GRAPHS = 4  # decoding methods whose graphs are kept with decode buffers

Step = Callable[[], None]
"""Function that runs or replays the decode graph."""


class TokenGraph:
    """A selection over tensors of its own, and the call that decodes and selects one token.

    All of it is operations over tensors that keep their addresses, without a value of the host that changes. In the
    first generation it is two CUDA graphs: the decode graph, which other methods replay as well, and the selection.
    From the second one on, which shows that the method recurs, it is captured as one. For ONNX Runtime's graphs of
    thousands of nodes, the capture takes longer than a short generation.

    Args:
        step: Runs the decode graph, within a capture too.
        captured_step: Runs or replays it.
        inputs: Its inputs besides caches and constants. They are this token's, except the mask of the token itself,
            and become the next token's.
        logits: Its output, [B, 1, vocabulary].
        reorder: Reorders the caches, or the table by which the step reads them, given the source row of every row [B]
            and the number of tokens in them [1].
        selection: A `protocol.Selection`, which writes the ids to where the graph reads them.
        name: Name of batch size and bucket, for log messages.

    Attributes:
        selection: The selection.
        token: What decodes and selects a token as one graph.
    """

    def __init__(
        self,
        step: Step,
        captured_step: Step,
        inputs: Mapping[str, Tensor],
        logits: Tensor,
        reorder: Callable[[Tensor, Tensor], object],
        selection: Any,
        name: str,
    ) -> None:
        def prepare() -> None:
            length = inputs[POSITION].view(-1)[:1]  # of all rows, or a scalar in graphs of earlier versions
            if selection.parents is not None:
                reorder(selection.parents, length)
            if MASK in inputs:
                inputs[MASK].index_fill_(1, length, 1)

        def select() -> None:
            selection.select(logits)
            inputs[POSITION].add_(1)
            if POSITION_IDS in inputs:
                inputs[POSITION_IDS].add_(1)

        def token() -> None:
            prepare()
            step()
            select()

        device: torch.device = logits.device
        self.selection = selection
        self._prepare, self._captured_step = prepare, captured_step
        self._select = CudaGraphCallable(select, device, f"the selection of tokens {name}")
        self.token = CudaGraphCallable(token, device, f"the graph of a token {name}")
        self._generations = 0

    def begin(self, selection: Any) -> None:
        """Continue a selection of the same method, which has other tensors."""
        self.selection.copy_from(selection)
        self._generations += 1

    def __call__(self) -> None:
        """Decode and select one token, the same position for all rows."""
        if self._generations > 1:
            self.token()
            return
        self._prepare()
        self._captured_step()
        self._select()
