"""Encoder-decoder models: what T5, BART, Marian and their like share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from accel.adapter import Port, Role, Signature

ENCODED = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")  # a layer's caches, in this order


class Encoder(nn.Module):
    """[batch, source] ids and mask -> [batch, source, width] hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(nn.Module):
    """The whole model behind its encoder, so that the head and every scaling of its input and output come along.

    Without past it returns the logits and four caches a layer; with past, the logits and the two that grew.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        # input_ids: [B, T], encoder_hidden_states: [B, S, D], encoder_attention_mask: [B, S]
        # past: decoder [B, H, P, K], encoder [B, H, S, K], both twice a layer
        layers = [tuple(past[i : i + len(ENCODED)]) for i in range(0, len(past), len(ENCODED))]
        output = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            past_key_values=EncoderDecoderCache(layers) if layers else None,
            use_cache=True,
        )
        cache = output.past_key_values
        present: list[Tensor] = []
        for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
            present += [own.keys, own.values]
            if not layers:
                present += [cross.keys, cross.values]
        return (output.logits, *present)  # [B, T, V], [B, H, P + T, K], ...


class Seq2Seq:
    """Adapter of encoder-decoder models. `layers` is the config attribute that counts the decoder's layers."""

    def __init__(self, model_types: Sequence[str], layers: str = "num_hidden_layers") -> None:
        self.model_types = tuple(model_types)
        self.layers = layers

    def roles(self) -> tuple[Role, ...]:
        return (Role.ENCODER, Role.PREFILL, Role.STEP)

    def wrap(self, model: PreTrainedModel, role: Role) -> nn.Module:
        return Encoder(model) if role is Role.ENCODER else Decoder(model)

    def signature(self, config: PretrainedConfig, role: Role) -> Signature:
        batch_source = {0: "batch", 1: "source"}
        if role is Role.ENCODER:
            return Signature(
                inputs=(
                    Port("input_ids", batch_source, torch.int64),
                    Port("attention_mask", batch_source, torch.int64),
                ),
                outputs=(Port("last_hidden_state", batch_source),),
            )
        inputs = [
            Port("input_ids", {0: "batch", 1: "new"}, torch.int64),
            Port("encoder_hidden_states", batch_source, source="last_hidden_state"),
            Port("encoder_attention_mask", batch_source, torch.int64, source="attention_mask"),
        ]
        outputs = [Port("logits", {0: "batch", 1: "new"})]
        for layer in range(getattr(config.get_text_config(decoder=True), self.layers)):
            for part in ENCODED:
                own = part.startswith("decoder")
                present = f"present.{layer}.{part}"
                if role is Role.STEP:
                    axes = {0: "batch", 2: "past" if own else "source"}
                    inputs.append(Port(f"past_key_values.{layer}.{part}", axes, source=present))
                if own or role is Role.PREFILL:  # the encoder's caches do not change after prefill
                    outputs.append(Port(present, {0: "batch", 2: "total" if own else "source"}))
        return Signature(tuple(inputs), tuple(outputs))

    def feeds(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)  # [B, S]
        lengths = torch.randint(max(1, length // 2), length + 1, (batch, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()  # [B, S]
        return {"input_ids": ids * mask + (config.pad_token_id or 0) * (1 - mask), "attention_mask": mask}
