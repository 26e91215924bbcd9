"""LongT5's encoder. It sums blocks of tokens, whose number depends on the input and would be traced as a constant."""

from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.longt5 import modeling_longt5

from . import seq2seq


def block_sums(hidden: Tensor, block_ids: Tensor, blocks: int) -> Tensor:
    """Sum the hidden states of each block of tokens: [B, S, D] -> [B, blocks, D].

    Replaces a function of transformers that uses `one_hot`, whose number of classes is a constant in a traced graph.
    `block_ids`: the block of each token, [B, S]; -1 for none.
    """
    membership = block_ids[..., None] == torch.arange(blocks, device=block_ids.device)  # [B, S, blocks]
    return torch.einsum("bsd,bsn->bnd", hidden, membership.to(hidden.dtype))


class Encoder(seq2seq.Encoder):
    """Encoder whose global tokens are made by `block_sums`."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the encoder as `seq2seq.Encoder` does."""
        with patch.object(modeling_longt5, "_create_global_aggregates", block_sums):
            return super().forward(*tensors)
