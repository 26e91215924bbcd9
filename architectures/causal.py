"""Decoder-only models: what GPT, Llama and their like share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from accel.adapters.types import Component, Signature
from accel.models.model_class import model_class

from .experts import in_turn
from .parts import Flat, TensorSpecs, cache_tensors, random_ids, random_lengths

PARTS = {"key": "past", "value": "past"}  # a layer's caches, in this order


class Decoder(Flat):
    """The model with flat caches: the logits of the tokens to keep, and two caches a layer."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # input_ids, position_ids: [B, T], attention_mask: [B, P + T], logits_to_keep: [N] of T, past: [B, H, P, K]
        given, past = self.split(tensors)
        # Every layer keeps all tokens, also where attention slides: what lies outside its window is masked.
        cache = DynamicCache([tuple(past[i : i + 2]) for i in range(0, len(past), 2)] or None)
        with in_turn(self.model):
            logits = self.model(**given, past_key_values=cache, use_cache=True).logits
        return (logits, *cache_tensors(*cache.layers))


class Causal:
    """Adapter of decoder-only models.

    `wrapper` makes the decoder from (model, names of its inputs before the caches). Other options: see `Ports`. Whether
    the model takes positions is read off its `forward`.
    """

    def __init__(
        self, model_types: Sequence[str] = (), wrapper: Callable[..., nn.Module] = Decoder, **options: Any
    ) -> None:
        self.model_types = tuple(model_types)
        self.wrapper = wrapper
        self.specs = TensorSpecs(**options)

    def components(self) -> tuple[Component, ...]:
        return (Component.PREFILL, Component.DECODE)

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        return self.wrapper(
            model, [spec.name for spec in self.signature(model.config, component).inputs if not spec.cached]
        )

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        taken = inspect.signature(model_class(config).forward).parameters
        axes = {
            "input_ids": {0: "batch", 1: "new"},
            "attention_mask": {0: "batch", 1: "total"},
            "position_ids": {0: "batch", 1: "new"},
            "logits_to_keep": {0: "kept"},
        }
        past, present = self.specs.caches(config, component, PARTS)
        inputs = [self.specs.of(name, axes[name]) for name in axes if name in taken]
        logits = self.specs.of("logits", {0: "batch", 1: "kept" if "logits_to_keep" in taken else "new"}, torch.float32)
        return Signature((*inputs, *past), (logits, *present))

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        ids = random_ids(config, batch, length, generator)  # [B, S], padded on the left
        mask = (torch.arange(length - 1, -1, -1) < random_lengths(batch, length, generator)).long()
        return {"input_ids": ids * mask + (config.pad_token_id or 0) * (1 - mask), "attention_mask": mask}
