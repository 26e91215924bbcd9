"""Prefill of a long prompt in chunks, so that its attention scores and masks take memory for one chunk at a time.

On a CPU it is also faster: no chunk computes scores of the chunks after it.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.runtime.decoder_inputs import kept_logits_inputs
from accel.runtime.layout import NUM_KEPT

if TYPE_CHECKING:
    from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState

MAX_CHUNKS = 16  # of `prefill_chunk` tokens, whose scores may be in memory at once
NEW, TOTAL = "new", "total"  # axes of the new tokens, and of the cached and the new ones


def needs_chunks(runtime: "DynamicCacheRuntime", batch: int, tokens: int) -> bool:
    """Return whether prompts [batch, tokens] are too long to be computed at once, or too many."""
    chunk = runtime.prefill_chunk
    if chunk == 0:
        return False
    return tokens > chunk or (runtime.single_row_chunks and batch * tokens**2 > MAX_CHUNKS * chunk**2)


def prefill_in_chunks(
    runtime: "DynamicCacheRuntime", inputs: Mapping[str, Tensor]
) -> tuple[Tensor, "DynamicCacheState"]:
    """Run the decoder over long or many prompts; arguments and result as of `DynamicCacheRuntime.prefill`.

    Where the graph takes several tokens behind cached ones for one sequence only, one prompt follows the other.
    """
    batch = inputs["input_ids"].shape[0]
    if not runtime.single_row_chunks or batch == 1:
        return _prefill(runtime, inputs)
    logits: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    for row in range(batch):
        row_logits, state = _prefill(runtime, _row(runtime, inputs, row))
        logits.append(row_logits)
        rows.append(dict(state.views()))
        del state  # so that its caches are freed one by one below
    caches = {name: torch.cat([row.pop(name) for row in rows]) for name in list(rows[0])}
    return torch.cat(logits), runtime.state_over(caches, inputs)


def decode_in_chunks(
    runtime: "DynamicCacheRuntime", inputs: Mapping[str, Tensor], state: "DynamicCacheState"
) -> Tensor:
    """Run the decoder over more than `runtime.prefill_chunk` tokens behind cached ones.

    Arguments and result as of `DynamicCacheRuntime.decode`.
    """
    logits, _ = _prefill(runtime, inputs, state)
    return logits


def _prefill(
    runtime: "DynamicCacheRuntime", inputs: Mapping[str, Tensor], state: "DynamicCacheState | None" = None
) -> tuple[Tensor, "DynamicCacheState"]:
    """Run the decoder over one chunk after the other, the tokens whose logits are kept in one of them.

    Args:
        runtime: Runtime of the decoder.
        inputs: Its inputs, for more than one chunk.
        state: Caches of earlier tokens, updated in place; None for a prompt's beginning.
    """
    length, keep = inputs["input_ids"].shape[1], int(inputs.get(NUM_KEPT, 0))
    past = 0 if state is None else state.length
    if state is not None and runtime.in_place:
        runtime.make_room(state, length)
    starts = [start for start in range(0, length, runtime.prefill_chunk) if start <= length - max(keep, 1)]
    kept_logits: list[Tensor] = []
    for start, end in pairwise([*starts, length]):
        chunk_keep = 1 if keep and end < length else keep
        chunk = chunk_inputs(runtime, inputs, start, end, past)
        chunk |= kept_logits_inputs(end - start, chunk_keep, runtime.device)
        if state is None:
            logits, state = runtime.prefill_at_once(chunk)
            if runtime.in_place:
                runtime.make_room(state, length - end)
        else:
            logits = runtime.decode_at_once(chunk, state)
        if not keep or end == length:
            kept_logits.append(logits)
    if state is None:
        raise ValueError("the prompt is empty")
    return torch.cat(kept_logits, dim=1), state


def chunk_inputs(
    runtime: "DynamicCacheRuntime", inputs: Mapping[str, Tensor], start: int, end: int, past: int
) -> dict[str, Tensor]:
    """Return the inputs for the tokens from `start` to `end`, behind `past` cached ones."""
    chunk = {}
    for name, tensor in inputs.items():
        axes = runtime.decoder.inputs[name].shape if name in runtime.decoder.inputs else []
        for axis, symbol in enumerate(axes):
            if symbol == NEW:
                tensor = tensor.narrow(axis, start, end - start)
            elif symbol == TOTAL:
                tensor = tensor.narrow(axis, 0, past + end)
        chunk[name] = tensor
    return chunk


def _row(runtime: "DynamicCacheRuntime", inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return the inputs of one sequence of a batch."""
    return {name: tensor[row : row + 1] if name in runtime.batched else tensor for name, tensor in inputs.items()}
