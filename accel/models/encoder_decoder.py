"""Models that encode their input once and then decode token by token."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import Seq2SeqLMOutput

from accel.models import arguments
from accel.models.cache import state_of
from accel.models.decoding.loops import InputsFor
from accel.models.encoder import Encoder
from accel.models.generation import AcceleratedModel
from accel.runtime.protocol import Runtime, State


class EncoderDecoderModel(AcceleratedModel):
    """Model that encodes its input once and then decodes token by token."""

    supported_model_kwargs = frozenset({"attention_mask", "encoder_outputs", "past_key_values", "use_cache"})

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(runtime, config, generation_config)
        source_vocabulary, self._vocabulary = arguments.vocabulary_sizes(config)
        self._encoder = Encoder(runtime, self.main_input_name, source_vocabulary, self._usage)

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """Return the encoder, which is the same for every modality."""
        return self._encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Run the decoder on new tokens, after the encoder where its outputs are not given.

        Args:
            input_ids: Encoder input: ids [batch, source]; of a speech model its features.
            attention_mask: Mask of the encoder input, [batch, source].
            decoder_input_ids: New decoder tokens, [batch, new]. By default `labels`, shifted to the right.
            decoder_attention_mask: [batch, past + new]; must not hide a token.
            encoder_outputs: Outputs of an earlier call of the encoder; its first item is [batch, source, width].
            past_key_values: Caches of the decoder tokens before the new ones: those of an earlier call, or a
                transformers cache of tensors, which is filled in place.
            labels: Expected ids [batch, new], -100 where none is expected. The loss is computed in float32.
            use_cache: False returns no caches.
            return_dict: False returns a tuple. By default as the config says.
            kwargs: The main input by name, where it is not `input_ids`.

        Returns:
            Loss where `labels` are given, logits [batch, new, vocabulary], caches, and the encoder's last hidden state.

        Raises:
            ValueError: An input is missing or has a wrong type, shape or range, or asks for what a graph doesn't have.
            TypeError: An argument is unknown.
            RuntimeError: The model is closed.
        """
        main_input = input_ids if input_ids is not None else kwargs.pop(self.main_input_name, None)
        arguments.reject(kwargs, self.forward)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids is missing")
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            raise ValueError("decoder_attention_mask has zeros, but an exported decoder attends to all decoder tokens")
        hidden = None if encoder_outputs is None else encoder_outputs[0]  # [batch, source, width]
        inputs = {"input_ids": decoder_input_ids}
        if state_of(past_key_values) is None:
            if hidden is None:
                hidden = self._encode(main_input, attention_mask)
            inputs = self._first_inputs(decoder_input_ids, hidden, attention_mask)
        logits, cache = self._run_decoder(inputs, past_key_values, use_cache)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else _token_loss(logits, labels),
            logits=logits,
            past_key_values=cache,  # type: ignore[arg-type]  # typed more narrowly than `generate` needs
            encoder_last_hidden_state=hidden,
        )
        return self._as_asked(output, return_dict)

    def prefill_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the decoder's inputs for its first tokens, after a run of the encoder if its outputs are not given.

        Args:
            input_ids: Encoder input: ids [source] or [batch, source]; of a speech model its features [batch, ...].
            attention_mask: Mask of the encoder input, in the shape of ids.
            decoder_input_ids: First decoder tokens, [new] or [batch, new]. By default the start token alone.
            encoder_outputs: Outputs of an earlier call of the encoder; its first item is [batch, source, width].
            kwargs: The main input by name, where it is not `input_ids`.

        Raises:
            ValueError: An input is missing or has a wrong type, shape or range.
            TypeError: An argument is unknown.
        """
        main_input = input_ids if input_ids is not None else kwargs.pop(self.main_input_name, None)
        arguments.reject(kwargs, self.prefill_inputs)
        if main_input is not None:
            main_input = torch.atleast_2d(main_input)
        if attention_mask is not None:
            attention_mask = torch.atleast_2d(attention_mask)
        hidden = None if encoder_outputs is None else encoder_outputs[0]
        if hidden is None:
            hidden = self._encode(main_input, attention_mask)
        if decoder_input_ids is None:
            decoder_input_ids = torch.full((len(hidden), 1), self._start_token(), device=self.device)
        return self._first_inputs(torch.atleast_2d(decoder_input_ids), hidden, attention_mask)

    def _start_token(self) -> int:
        """Return the id that decoding starts with, as transformers' `generate` chooses it."""
        start = self.generation_config.decoder_start_token_id
        start = self.generation_config.bos_token_id if start is None else start
        if start is None:
            raise ValueError("decoder_input_ids is missing, and the generation config has no decoder_start_token_id")
        return int(start)

    def _first_inputs(self, ids: Tensor, hidden: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """Return the decoder's inputs for tokens [batch, new] without others before them."""
        arguments.check_ids("decoder_input_ids", ids, self._vocabulary)
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
        return {"input_ids": ids, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def _encode(self, main_input: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return the encoder's last hidden state, [batch, source, width]."""
        if main_input is None:
            raise ValueError(f"either {self.main_input_name} or encoder_outputs is needed")
        hidden: Tensor = self._encoder(main_input, attention_mask=attention_mask)[0]
        return hidden

    def _decode_inputs(self, model_kwargs: Mapping[str, Any], state: State, max_new_tokens: int) -> InputsFor:
        """Return a function that returns decode inputs, which here are the ids alone."""
        return lambda ids, steps: {"input_ids": ids}


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [batch, length, vocabulary] where labels [batch, length] aren't -100."""
    return cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=-100)
