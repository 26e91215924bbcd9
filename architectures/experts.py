"""Mixtures of experts, one expert after the other, so that a graph neither copies nor reads the weights of idle ones.

What transformers has reads tensors back to find the busy experts, or gathers each token's expert weights into a copy of
them (`batched_mm`); neither makes a graph one would want. The interface:
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "one_after_the_other"


def one_after_the_other(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Hidden [N, D], each token's experts `chosen` [N, K] and their `weights` [N, K] -> [N, D]."""
    result = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        tokens, places = torch.where(chosen == expert)  # as many as chose it, which may be none
        inner = _product(self, hidden[tokens], "gate_up_proj" if self.has_gate else "up_proj", expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _product(self, inner, "down_proj", expert)
        if getattr(self, "has_post_expert_norm", False):  # transformers 5.20
            outer = self.post_expert_norm(outer)
        weighted = outer * weights[tokens, places, None]  # routers compute in float32
        result = result.index_add(0, tokens, weighted.to(result.dtype))
    return result


def _product(self: Any, inputs: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(self, name)[expert]
    outputs: Tensor = inputs @ (weight if self.is_transposed else weight.T)
    return outputs.add(getattr(self, f"{name}_bias")[expert]) if self.has_bias else outputs


@contextmanager
def in_turn(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the experts of `model`, if it has any, compute one after the other."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(NAME, one_after_the_other)
    model.set_experts_implementation(NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
