"""Models that continue their input."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.cache_utils import Cache, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from accel.models import arguments
from accel.models.cache import state_of
from accel.models.decoding.loops import InputsFor
from accel.models.generation import AcceleratedModel
from accel.models.prompt_cache import PromptCache
from accel.runtime.decoder_inputs import decoder_inputs, positions
from accel.runtime.protocol import Runtime, State


class DecoderOnlyModel(AcceleratedModel):
    """Model that continues its input. Shorter inputs of a batch are padded on the left."""

    supported_model_kwargs = frozenset(
        {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    )

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(runtime, config, generation_config)
        _, self._vocabulary = arguments.vocabulary_sizes(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder on new tokens.

        Args:
            input_ids: New tokens, [batch, new].
            attention_mask: [batch, past + new], 0 at padding; None for inputs without padding.
            position_ids: Positions of the new tokens, [batch or 1, new]. By default as the transformers class counts
                them: every token of the input, or those that the mask shows.
            past_key_values: Caches of the tokens before the new ones: those of an earlier call, or a transformers cache
                of tensors, which is filled in place.
            labels: Expected ids [batch, new], aligned with `input_ids` and shifted here; -100 where none is expected.
            use_cache: False returns no caches, except where `past_key_values` are given.
            logits_to_keep: Number of last tokens to return logits for, 0 for all; or these tokens' indices [kept].
            return_dict: False returns a tuple. By default as the config says.
            kwargs: None is supported.

        Returns:
            Loss where `labels` are given, logits [batch, kept, vocabulary] and caches.

        Raises:
            ValueError: An input is missing or has a wrong type, shape or range, or asks for what a graph doesn't have.
            TypeError: An argument is unknown.
            RuntimeError: The model is closed.
        """
        arguments.reject(kwargs, self.forward)
        if input_ids is None:
            raise ValueError("input_ids is missing")
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if state_of(past_key_values) is None:
            arguments.check_ids("input_ids", input_ids, self._vocabulary)
        batch, new = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + new, dtype=torch.int64)
        if isinstance(past_key_values, StaticCache):  # transformers may pad the mask to the cache's length
            attention_mask = attention_mask[:, : past + new]
        arguments.check_mask("attention_mask", attention_mask, batch, past + new)
        if position_ids is None and not self.runtime.positions_from_mask:
            position_ids = torch.arange(past, past + new, device=input_ids.device)[None]
        inputs = decoder_inputs(input_ids, attention_mask, logits_to_keep, position_ids)
        logits, cache = self._run_decoder(inputs, past_key_values, use_cache)
        logits = logits[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else logits
        output = CausalLMOutputWithPast(
            loss=None if labels is None else ForCausalLMLoss(logits, labels, logits.shape[-1]),
            logits=logits,
            past_key_values=cache,
        )
        return self._as_asked(output, return_dict)

    def prefill_inputs(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the decoder's inputs for a prompt, of which the last token's logits are computed.

        Args:
            input_ids: [length] or [batch, length].
            attention_mask: Likewise, 0 at padding on the left; None for a prompt without padding.
            kwargs: None is supported.

        Raises:
            ValueError: An input is missing or has a wrong type, shape or range.
            TypeError: An argument is unknown.
        """
        arguments.reject(kwargs, self.prefill_inputs)
        if input_ids is None:
            raise ValueError("input_ids is missing")
        input_ids = torch.atleast_2d(input_ids)
        arguments.check_ids("input_ids", input_ids, self._vocabulary)
        mask = torch.ones_like(input_ids) if attention_mask is None else torch.atleast_2d(attention_mask)
        arguments.check_mask("attention_mask", mask, *input_ids.shape)
        return decoder_inputs(input_ids, mask, 1)

    def cache_prompt(self, input_ids: Tensor) -> PromptCache:
        """Compute the tokens that many prompts begin with, for `generate(prompts, past_key_values=...)`.

        Args:
            input_ids: Their ids, [1, length].

        Returns:
            A cache that serves any number of generations. It holds device memory as long as it is referenced.

        Raises:
            ValueError: There are several sequences, or the ids have a wrong type or range.
            RuntimeError: The model is closed.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1:
            raise ValueError(
                f"input_ids of shape {list(input_ids.shape)}: a prompt cache takes one sequence, [1, length]"
            )
        cache = self(input_ids=input_ids, logits_to_keep=1, return_dict=True).past_key_values
        state = state_of(cache)
        if state is None:
            raise TypeError(f"the model returned a {type(cache).__name__} without a runtime's state")
        return PromptCache(state, input_ids)

    def _decode_inputs(self, model_kwargs: Mapping[str, Any], state: State, max_new_tokens: int) -> InputsFor:
        """Return a function that returns decode inputs, whose mask and positions advance by one token per step.

        The mask in `model_kwargs` already includes the first new token, and the positions are that token's too.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(state.batch, state.length + 1, dtype=torch.int64, device=self.device)
        full_mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)  # sliced per call, never copied
        length = mask.shape[1]
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None:
            position_ids = positions(mask)
        position = position_ids[:, -1:]  # [batch or 1, 1]

        def inputs_for(ids: Tensor, steps: int) -> Mapping[str, Tensor]:
            return decoder_inputs(ids, full_mask[:, : length + steps], 1, position + steps)

        return inputs_for
