"""Adapter of decoder-only models, such as GPT-2 and Llama."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from accel.adapters.types import Component, Signature
from accel.models.model_class import model_class

from .experts import use_sequential_experts
from .parts import Flat, TensorSpecs, cache_tensors, random_ids, random_lengths

PARTS = {"key": "past", "value": "past"}  # a layer's caches in order -> name of their length axis


class Decoder(Flat):
    """Decoder-only model with flat caches: returns logits and two caches per layer."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            *tensors: The inputs `names`, of input_ids and position_ids [B, T], attention_mask [B, P + T] and
                logits_to_keep [N]; then, with past, key and value of every layer, [B, H, P, K].

        Returns:
            Logits [B, N, V], then key and value of every layer, [B, H, P + T, K].
        """
        inputs, past = self.split(tensors)
        layers = [(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        # A dynamic cache made this way keeps all tokens in every layer, also where attention has a sliding window:
        # tokens outside the window are masked.
        cache = DynamicCache(layers or None)
        with use_sequential_experts(self.model):
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        return (logits, *cache_tensors(*cache.layers))


class Causal:
    """Adapter of decoder-only models.

    Which inputs a model takes besides the ids is read from the parameters of its `forward`.

    Args:
        model_types: Values of the Hugging Face config's `model_type` that the adapter handles.
        wrapper: Makes the decoder's wrapper from the model and the names of its inputs other than caches.
        **options: Arguments of `TensorSpecs`.
    """

    def __init__(
        self, model_types: Sequence[str] = (), wrapper: Callable[..., nn.Module] = Decoder, **options: Any
    ) -> None:
        self.model_types = tuple(model_types)
        self.wrapper = wrapper
        self.specs = TensorSpecs(**options)

    def components(self) -> tuple[Component, ...]:
        """Return prefill and decode."""
        return (Component.PREFILL, Component.DECODE)

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        """Return the decoder's wrapper, which serves both components."""
        inputs = self.signature(model.config, component).inputs
        return self.wrapper(model, [spec.name for spec in inputs if not spec.cached])

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        """Return the tensor specs of `component`."""
        parameters = inspect.signature(model_class(config).forward).parameters
        axes = {
            "input_ids": {0: "batch_size", 1: "new"},
            "attention_mask": {0: "batch_size", 1: "total"},
            "position_ids": {0: "batch_size", 1: "new"},
            "logits_to_keep": {0: "kept"},
        }
        inputs = [self.specs.of(name, axes[name]) for name in axes if name in parameters]
        logits_length = "kept" if "logits_to_keep" in parameters else "new"
        logits = self.specs.of("logits", {0: "batch_size", 1: logits_length}, torch.float32)
        past, present = self.specs.caches(config, component, PARTS)
        return Signature((*inputs, *past), (logits, *present))

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return random ids and their mask, [batch, length], padded on the left."""
        ids = random_ids(config, batch, length, generator)  # [B, S]
        distance_to_end = torch.arange(length - 1, -1, -1)  # [S]
        mask = (distance_to_end < random_lengths(batch, length, generator)).long()  # [B, S]
        return {"input_ids": ids * mask + (config.pad_token_id or 0) * (1 - mask), "attention_mask": mask}
