"""Adapter of encoder-decoder models, such as T5, BART and Marian."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from accel.adapters.types import Component, Signature, TensorSpec

from .parts import Flat, TensorSpecs, cache_tensors, random_ids, random_lengths

# Self-attention and cross-attention caches of a layer, in this order.
OWN, CROSS = ("decoder.key", "decoder.value"), ("encoder.key", "encoder.value")


class Encoder(Flat):
    """Encoder with flat inputs."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__(model.get_encoder(), names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the encoder on the inputs `names`, [B, S, ...], and return hidden states, [B, S, D]."""
        inputs, _ = self.split(tensors)
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden


class Decoder(Flat):
    """Whole model called with encoder outputs, so that the head and any scaling of inputs or logits are included."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the decoder.

        Args:
            *tensors: The inputs `names`, of input_ids [B, T], encoder_hidden_states [B, S, D] and
                encoder_attention_mask [B, S]; then, with past, four caches per layer: key and value of self-attention,
                [B, H, P, K], and of cross-attention, [B, H, S, K].

        Returns:
            Logits [B, T, V], then the caches of every layer: without past all four, with past the two of
            self-attention, [B, H, P + T, K].
        """
        inputs, past = self.split(tensors)
        layers = [tuple(past[i : i + 4]) for i in range(0, len(past), 4)]
        cache = EncoderDecoderCache(layers) if layers else EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = {}
        if "encoder_attention_mask" in inputs:
            mask["attention_mask"] = inputs["encoder_attention_mask"]
        output = self.model(
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=inputs["encoder_hidden_states"]),
            past_key_values=cache,
            use_cache=True,
            **mask,
        )
        present: list[Tensor] = []
        for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
            present += cache_tensors(own) if layers else cache_tensors(own, cross)
        return (output.logits, *present)


class Seq2Seq:
    """Adapter of encoder-decoder models.

    Args:
        model_types: Values of the Hugging Face config's `model_type` that the adapter handles.
        encoder: Makes the encoder's wrapper from the model and the names of its inputs.
        wrapper: Makes the decoder's wrapper from the model and the names of its inputs other than caches.
        **options: Arguments of `TensorSpecs`.
    """

    # Dynamic axes of the encoder's inputs and output.
    source: ClassVar[Mapping[int, str]] = {0: "batch_size", 1: "source"}

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
        """Return encoder, prefill and decode."""
        return (Component.ENCODER, Component.PREFILL, Component.DECODE)

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        """Return the encoder's wrapper, or the decoder's, which serves prefill and decode."""
        inputs = self.signature(model.config, component).inputs
        names = [spec.name for spec in inputs if not spec.cached]
        make_wrapper = self.encoder if component is Component.ENCODER else self.wrapper
        return make_wrapper(model, names)

    def encoder_inputs(self) -> list[TensorSpec]:
        """Return the specs of the encoder's inputs."""
        return [self.specs.of("input_ids", self.source), self.specs.of("attention_mask", self.source)]

    def decoder_context(self) -> list[TensorSpec]:
        """Return the specs of the decoder's inputs that come from the encoder's inputs and outputs."""
        return [
            self.specs.of("encoder_hidden_states", self.source, torch.float32, source="last_hidden_state"),
            self.specs.of("encoder_attention_mask", self.source, source="attention_mask"),
        ]

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        """Return the tensor specs of `component`."""
        if component is Component.ENCODER:
            hidden = self.specs.of("last_hidden_state", self.source, torch.float32)
            return Signature(tuple(self.encoder_inputs()), (hidden,))
        batch_new = {0: "batch_size", 1: "new"}
        parts = dict.fromkeys(OWN, "past") | dict.fromkeys(CROSS, self.source.get(1))
        past, present = self.specs.caches(config, component, parts)
        inputs = [self.specs.of("input_ids", batch_new), *self.decoder_context(), *past]
        return Signature(tuple(inputs), (self.specs.of("logits", batch_new, torch.float32), *present))

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return random ids and their mask, [batch, length], padded on the right."""
        ids = random_ids(config, batch, length, generator)  # [B, S]
        mask = (torch.arange(length) < random_lengths(batch, length, generator)).long()  # [B, S]
        return {"input_ids": ids * mask + (config.pad_token_id or 0) * (1 - mask), "attention_mask": mask}
