"""Encoder-decoder models that listen: features of one fixed length in, no mask over them."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from accel.adapters.types import TensorSpec

from .seq2seq import Seq2Seq


class Speech(Seq2Seq):
    """Adapter of models whose encoder takes `input_features` [batch, mel bins, frames]."""

    source: ClassVar[Mapping[int, str]] = {0: "batch"}

    def encoder_inputs(self) -> list[TensorSpec]:
        return [self.specs.of("input_features", self.source, torch.float32)]

    def decoder_context(self) -> list[TensorSpec]:
        return [self.specs.of("encoder_hidden_states", self.source, torch.float32, source="last_hidden_state")]

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        # Two frames a position, for the encoder's second convolution has a stride of 2. `length` is not ours to choose.
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
