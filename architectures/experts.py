"""Mixture-of-experts layers for tracing: experts computed sequentially, each on the tokens routed to it.

Such a graph neither copies the weights of experts nor reads those of experts without tokens. The implementations of
transformers don't trace to that: they read tensors back to the host to find the experts in use, or gather a copy of the
expert weights for every token (`batched_mm`). The interface for another implementation:
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "accel_sequential"  # in the registry of transformers


def sequential_experts(self: Any, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Compute the experts' module `self` one expert at a time: hidden states [N, D] -> hidden states [N, D].

    `expert_ids`: the experts of each token, [N, K]. `weights`: their routing weights, [N, K].
    """
    result = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        tokens, choices = torch.where(expert_ids == expert)  # [M] each, indices into N and K; M may be 0
        inner = _project(self, hidden[tokens], "gate_up_proj" if self.has_gate else "up_proj", expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _project(self, inner, "down_proj", expert)  # [M, D]
        if getattr(self, "has_post_expert_norm", False):  # since transformers 5.20
            outer = self.post_expert_norm(outer)
        weighted = outer * weights[tokens, choices, None]  # float32 where the router computes in float32
        result = result.index_add(0, tokens, weighted.to(result.dtype))
    return result


def _project(self: Any, inputs: Tensor, name: str, expert: int) -> Tensor:
    """Apply the linear layer `name` of one expert to `inputs`, [M, features in] -> [M, features out]."""
    weight = getattr(self, name)[expert]
    outputs: Tensor = inputs @ (weight if self.is_transposed else weight.T)
    return outputs.add(getattr(self, f"{name}_bias")[expert]) if self.has_bias else outputs


@contextmanager
def use_sequential_experts(model: PreTrainedModel) -> Iterator[None]:
    """Open a context in which the experts of `model`, if it has any, are computed by `sequential_experts`."""
    if not model._can_set_experts_implementation():
        yield
        return
    previous = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(NAME, sequential_experts)
    model.set_experts_implementation(NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(previous)
