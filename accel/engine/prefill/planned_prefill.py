"""Prompts by the plan of a decode step: see `prefill.graph`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.planning.plan import Plan
from accel.engine.prefill.graph import IDS, KEPT_ROWS, MASK, POSITION, POSITION_IDS, PROMPTS, SEEN, prefill_of

NUM_KEPT = "num_logits_to_keep"
MAX_SHAPES = 64  # of prompts, for which graphs stay prepared
HIDDEN = -1e4  # a bias of at most so much hides a key


class PlannedPrefill:
    """Prompts of a decoder-only model, without a session of ONNX Runtime.

    Args:
        plan: The plan of a static decode graph, whose weights it shares.
        device: Device to run on.
        least_tokens: Number of tokens of all prompts from which on they are computed; half as many where some are
            padding, whose mask ONNX Runtime's attention takes longer with.

    Raises:
        NoMatchError: The plan has something that prompts don't have, or that would be slow: see `prefill_of`.
        AccelError: A node can't run.
    """

    def __init__(self, plan: Plan, device: torch.device, least_tokens: int) -> None:
        parts = {padded: prefill_of(plan, padded) for padded in (False, True)}
        self._executors = {padded: Executor(part.graph, device, MAX_SHAPES) for padded, part in parts.items()}
        self._caches, bias = parts[False].caches, parts[False].bias
        self._bias = None if bias is None else Executor(bias, device, MAX_SHAPES)
        self._least_tokens = least_tokens
        self._axes, self._device = plan.trace.shapes, device
        self._unbiased, self._biased = 0, float("inf")  # no bias up to this length; one from this length on

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Compute prompts.

        Args:
            inputs: `input_ids`, `position_ids` and `attention_mask`, 0 for padding, int64 [B, N]; and
                `num_logits_to_keep`, int64 scalar on the host: number of last tokens whose logits are computed, 0 or
                none for all.

        Returns:
            Logits [B, kept, vocabulary], and cache input -> its content for these tokens, [B, heads, N, size]. None if
            attention has a bias between tokens so far apart, such as that of a sliding window, or if the prompts have
            fewer tokens than `least_tokens`.
        """
        batch, length = inputs[IDS].shape
        if batch * length < self._least_tokens // 2 or not self._is_unbiased(length):
            return None
        ids, mask, position_ids = (inputs[name].to(self._device, torch.int64) for name in (IDS, MASK, POSITION_IDS))
        padded = bool((mask == 0).any())
        if not padded and batch * length < self._least_tokens:
            return None
        keep = int(inputs.get(NUM_KEPT, 0))
        columns = torch.arange(length, device=self._device)
        kept = columns[max(0, length - keep) if keep else 0 :]
        starts = torch.arange(0, batch * length, length, device=self._device)
        feeds = {
            IDS: ids.reshape(-1, 1),
            PROMPTS: ids,
            POSITION: columns.repeat(batch),
            POSITION_IDS: position_ids.reshape(-1, 1),
            KEPT_ROWS: (starts[:, None] + kept).reshape(-1),
        }
        if padded:
            feeds[SEEN] = _seen(mask)
        outputs = self._executors[padded].run(feeds)
        caches = {cache: outputs[output] for cache, output in self._caches.items()}
        (logits,) = (value for name, value in outputs.items() if name not in self._caches.values())
        return logits.reshape(batch, len(kept), -1), caches

    def _is_unbiased(self, length: int) -> bool:
        """Return whether no token of such prompts has another bias than that which hides padding.

        Biases of attention to the most distant token are computed, for a length that is a power of two where that
        holds, so that few lengths are tried.
        """
        for tried in (max(16, 1 << (length - 1).bit_length()), length):
            if self._unbiased >= length or tried >= self._biased:
                continue
            if self._bias is None or self._only_hides_padding(self._bias, tried):
                self._unbiased = tried
            else:
                self._biased = tried
        return self._unbiased >= length

    def _only_hides_padding(self, biases: Executor, length: int) -> bool:
        """Return whether the biases of the last of `length` tokens hide the first one, which is padding, alone."""
        feeds = {
            name: torch.zeros((), dtype=dtype, device=self._device).expand(
                [
                    axis if isinstance(axis, int) else 1 if at == 0 else length
                    for at, axis in enumerate(self._axes[name])
                ]
            )
            for name, dtype in biases.inputs.items()
        }
        mask = torch.ones(1, length, dtype=torch.int64, device=self._device)
        mask[0, 0] = 0
        feeds |= {MASK: mask, POSITION: torch.tensor([length - 1], device=self._device)}
        found = [value.reshape(-1, value.shape[-1]).float() for value in biases.run(feeds).values()]
        return all(bool((bias[:, 0] <= HIDDEN).all()) and not bool(bias[:, 1:].any()) for bias in found)


def _seen(mask: Tensor) -> Tensor:
    """Return which keys each query sees, bool [B, 1, N, N], given the mask of padding [B, N].

    Padding sees itself, so that its output is a number: one that isn't would spread, though nothing else sees it.
    """
    length = mask.shape[1]
    diagonal = torch.eye(length, dtype=torch.bool, device=mask.device)
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return ((mask[:, None, None, :] != 0) & earlier) | diagonal
