"""Encoder-decoder models: what T5, BART, Marian and their like share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from accel.adapters.types import Component, Signature, TensorSpec

from .parts import Flat, TensorSpecs, cache_tensors, random_ids, random_lengths

OWN, CROSS = ("decoder.key", "decoder.value"), ("encoder.key", "encoder.value")  # a layer's caches, in this order


class Encoder(Flat):
    """The inputs `names`, [batch, source, ...] -> [batch, source, width] hidden states."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__(model.get_encoder(), names)

    def forward(self, *tensors: Tensor) -> Tensor:
        hidden: Tensor = self.model(**self.split(tensors)[0]).last_hidden_state
        return hidden


class Decoder(Flat):
    """The whole model behind its encoder, so that the head and every scaling of its input and output come along.

    Without past it returns the logits and four caches a layer; with past, the logits and the two that grew.
    """

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # input_ids: [B, T], encoder_hidden_states: [B, S, D], encoder_attention_mask: [B, S]
        # past: decoder [B, H, P, K], encoder [B, H, S, K], both twice a layer
        given, past = self.split(tensors)
        layers = [tuple(past[i : i + 4]) for i in range(0, len(past), 4)]
        cache = EncoderDecoderCache(layers) if layers else EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
        output = self.model(
            decoder_input_ids=given["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=given["encoder_hidden_states"]),
            past_key_values=cache,
            use_cache=True,
            **mask,
        )
        present: list[Tensor] = []
        for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
            present += cache_tensors(own) if layers else cache_tensors(own, cross)
        return (output.logits, *present)  # [B, T, V], [B, H, P + T, K], ...


class Seq2Seq:
    """Adapter of encoder-decoder models.

    `encoder` and `wrapper` make encoder and decoder from (model, names of its inputs before the caches). Other options:
    see `Ports`.
    """

    source: ClassVar[Mapping[int, str]] = {0: "batch", 1: "source"}  # axes of the encoder's inputs and output

    def __init__(
        self,
        model_types: Sequence[str] = (),
        encoder: Callable[..., nn.Module] = Encoder,
        wrapper: Callable[..., nn.Module] = Decoder,
        **options: Any,
    ) -> None:
        self.model_types = tuple(model_types)
        self.encoder, self.wrapper = encoder, wrapper
        self.specs = TensorSpecs(**options)

    def components(self) -> tuple[Component, ...]:
        return (Component.ENCODER, Component.PREFILL, Component.DECODE)

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        names = [spec.name for spec in self.signature(model.config, component).inputs if not spec.cached]
        return (self.encoder if component is Component.ENCODER else self.wrapper)(model, names)

    def encoder_inputs(self) -> list[TensorSpec]:
        return [self.specs.of("input_ids", self.source), self.specs.of("attention_mask", self.source)]

    def decoder_context(self) -> list[TensorSpec]:
        """What the decoder takes of the encoder's inputs and outputs."""
        return [
            self.specs.of("encoder_hidden_states", self.source, torch.float32, source="last_hidden_state"),
            self.specs.of("encoder_attention_mask", self.source, source="attention_mask"),
        ]

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        batch_new = {0: "batch", 1: "new"}
        if component is Component.ENCODER:
            hidden = self.specs.of("last_hidden_state", self.source, torch.float32)
            return Signature(tuple(self.encoder_inputs()), (hidden,))
        along = dict.fromkeys(OWN, "past") | dict.fromkeys(CROSS, self.source.get(1))
        past, present = self.specs.caches(config, component, along)
        inputs = [self.specs.of("input_ids", batch_new), *self.decoder_context(), *past]
        return Signature(tuple(inputs), (self.specs.of("logits", batch_new, torch.float32), *present))

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        ids = random_ids(config, batch, length, generator)  # [B, S]
        mask = (torch.arange(length) < random_lengths(batch, length, generator)).long()
        return {"input_ids": ids * mask + (config.pad_token_id or 0) * (1 - mask), "attention_mask": mask}
