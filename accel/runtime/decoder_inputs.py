"""The inputs of a decoder that its caller makes, for every call anew."""

import torch
from torch import Tensor


def positions(mask: Tensor) -> Tensor:
    """[batch, length] mask -> each token's place among those that are no padding, as transformers' `generate` does."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def decoder_inputs(ids: Tensor, mask: Tensor, keep: int = 0, places: Tensor | None = None) -> dict[str, Tensor]:
    """All a decoder may ask the caller for: `ids` [batch, new] are the last of those in `mask` [batch, past + new].

    The logits of the last `keep` are wanted, or of all. `places` [batch or 1, new]: if not those of `positions`.
    """
    new = ids.shape[1]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -new:] if places is None else places.expand(len(ids), -1),
        "logits_to_keep": torch.arange(max(0, new - keep) if keep else 0, new, device=ids.device),
    }
