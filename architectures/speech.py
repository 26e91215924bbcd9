"""Adapter of encoder-decoder models of speech, such as Whisper: features of one length, without a mask."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from accel.adapters.types import TensorSpec

from .seq2seq import Seq2Seq


class Speech(Seq2Seq):
    """Adapter of models whose encoder takes `input_features`, [batch, mel bins, frames]."""

    source: ClassVar[Mapping[int, str]] = {0: "batch_size"}

    def encoder_inputs(self) -> list[TensorSpec]:
        """Return the spec of the features."""
        return [self.specs.of("input_features", self.source, torch.float32)]

    def decoder_context(self) -> list[TensorSpec]:
        """Return the spec of the encoder's hidden states; there is no mask."""
        return [self.specs.of("encoder_hidden_states", self.source, torch.float32, source="last_hidden_state")]

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return random features, [batch, mel bins, frames]; `length` is ignored, because the model takes one only."""
        frames = 2 * config.max_source_positions  # the encoder's second convolution has a stride of 2
        return {"input_features": torch.randn((batch, config.num_mel_bins, frames), generator=generator)}
