"""LongT5, whose encoder sums blocks of tokens up, as many as there are, which tracing would take for a constant."""

from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.longt5 import modeling_longt5

from . import seq2seq


def sums_of_blocks(hidden: Tensor, block_of: Tensor, blocks: int) -> Tensor:
    """Hidden [B, S, D], each token's block [B, S], -1 for none -> [B, blocks, D].

    Transformers' own uses `one_hot`, whose number of classes a trace can't keep open.
    """
    belongs = block_of[..., None] == torch.arange(blocks, device=block_of.device)  # [B, S, blocks]
    return torch.einsum("bsd,bsn->bnd", hidden, belongs.to(hidden.dtype))


class Encoder(seq2seq.Encoder):
    def forward(self, *tensors: Tensor) -> Tensor:
        with patch.object(modeling_longt5, "_create_global_aggregates", sums_of_blocks):
            return super().forward(*tensors)
