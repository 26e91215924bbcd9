"""Decoder inputs that are computed on the caller's side for every call."""

from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.layout import KEPT, NUM_KEPT


def positions(mask: Tensor) -> Tensor:
    """Return each token's position among the tokens that aren't padding, as transformers' `generate` counts them.

    Args:
        mask: Attention mask [batch, length], 0 for padding.

    Returns:
        int64 [batch, length]; 0 at padding.
    """
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def decoder_inputs(
    ids: Tensor, mask: Tensor, keep: int | Tensor = 0, position_ids: Tensor | None = None
) -> dict[str, Tensor]:
    """Return every input that a decoder may take besides its caches and the encoder's output.

    Args:
        ids: New tokens [batch, new].
        mask: Attention mask [batch, past + new] over the cached and the new tokens.
        keep: Number of last tokens whose logits are computed, 0 for all new ones; indices of any tokens stand
            for all, for the caller to choose from.
        position_ids: Positions of the new tokens [batch or 1, new]; None for those of `positions(mask)`.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` [batch, new]; and `keep` as a merged decoder takes it,
        `num_logits_to_keep`, int64 scalar on the host, and as its components do, `logits_to_keep`, int64 indices into
        the new tokens.
    """
    new = ids.shape[1]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -new:] if position_ids is None else position_ids.expand(len(ids), -1),
        **kept_logits_inputs(new, 0 if isinstance(keep, Tensor) else keep, ids.device),
    }


def positions_are_below(length: int, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the positions of new tokens, behind `length` others, are those of tokens so far.

    A caller may choose larger `position_ids`, though no decoding method of transformers does. Waits for the device.
    """
    ids = inputs.get("position_ids")
    return ids is None or bool(((ids >= 0) & (ids < length + ids.shape[1])).all())


def kept_logits_inputs(new: int, keep: int, device: torch.device) -> dict[str, Tensor]:
    """Return the inputs that choose the last `keep` of `new` tokens, 0 for all, as `decoder_inputs` describes them."""
    first = max(0, new - keep) if keep else 0
    return {KEPT: torch.arange(first, new, device=device), NUM_KEPT: torch.tensor(keep)}
