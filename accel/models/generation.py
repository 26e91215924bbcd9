"""Models without PyTorch weights that run transformers' `generate` over any runtime.

`forward` calls the runtime's graphs. `generate`, all its options and all its decoding methods come from transformers'
`GenerationMixin`; `DecodingLoops` replaces the loops of greedy search, sampling and beam search.

Interfaces of transformers that `accel.models` relies on beyond its documented ones. pyproject.toml accepts transformers
5.17 to 5.x, and the code was read against 5.23: check this list before raising the bound.

- Overridden methods, which `generate` calls with the arguments that the overrides name: `_sample` and `_beam_search`
  (decoding/loops.py), `_prepare_cache_for_generation`, `create_masks_for_generate`, `prepare_inputs_for_generation`.
- Inherited methods that the overrides call: `_sample`, `_beam_search`, `_prepare_cache_for_generation`, `_prefill`
  (which runs the prompt and returns the outputs of `forward`), `_update_model_kwargs_for_generation`, and
  `_valid_auto_compile_criteria`.
- Attributes and methods that `GenerationMixin` expects of the class it is mixed into: `main_input_name`,
  `base_model_prefix`, `_is_stateful`, `config`, `generation_config`, `device`, `dtype`, `can_generate`,
  `is_remote_code`, `get_encoder`, `get_experts_implementation`, and the parameters' names of `forward` and of
  `prepare_inputs_for_generation`, which it reads with `inspect.signature`.
- Methods that it calls on a cache, and that a cache calls on its layers: all those that `cache.StateLayer` overrides.
- `GenerationMixin._get_logits_processor`, called on an object that has a config only, with
  `GenerationConfig._eos_token_tensor` set: option_check.py tries options on it before anything is exported.
- Attributes that accel reads: `GenerationConfig._pad_token_tensor` (decoding/token_selector.py); `eos_token_id`,
  `min_length`, `min_new_tokens` and `prompt_length_to_skip` of logits processors (decoding/processors.py); the auto
  classes' `_model_mapping` and the model classes' `_is_stateful` (model_class.py).
- Generation mixins of transformers' model classes, such as `WhisperGenerationMixin`, become base classes of our models;
  overrides of `prepare_inputs_for_generation` in model classes, such as Phi-3's, run on an instance of the model class
  without modules, for which `device` and `dtype` are set as plain attributes (see factory.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache, StaticCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput

from accel.models import arguments
from accel.models.cache import cache_over, fill, is_empty, state_of, tensors_of
from accel.models.decoding.loops import DecodingLoops
from accel.models.encoder import Encoder
from accel.models.module import InferenceModule
from accel.models.usage import Usage
from accel.runtime.decoder_inputs import decoder_inputs, positions
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.protocol import Runtime, State
from accel.runtime.streams import on_shared_stream
from accel.system.process_state import one_openmp_thread

Generates: TypeAlias = Any
"""Type of a model with transformers' `generate`, PyTorch's or ours. `Any`, as the mixin hides it from type checkers."""

# Decoding methods that don't access the cache before the first call of the model.
MODES_WITHOUT_EMPTY_CACHE = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}


Output = TypeVar("Output", bound=ModelOutput)


class AcceleratedModel(DecodingLoops, GenerationMixin, InferenceModule):
    """Base class of models without PyTorch weights. `generate` and all its options come from transformers.

    Args:
        runtime: Runs the graphs. The model owns it and closes it.
        config: The Hugging Face config of the exported model.
        generation_config: Defaults for `generate`.
    """

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(runtime, config, generation_config)
        self._usage = Usage(exclusive=runtime.exclusive)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate`, with every option and decoding method it has.

        Several threads may call it at once. Their calls run in parallel, or one after the other where the runtime's
        decode steps share buffers.

        Args:
            args: As for transformers' `generate`. Tensors must be on the model's device.
            kwargs: Likewise.

        Returns:
            As transformers' `generate`: token ids [batch, length], or a `ModelOutput` with `return_dict_in_generate`.

        Raises:
            DeviceMemoryError: The device is out of memory. The model stays usable.
            RuntimeError: The model is closed.
        """
        with (
            self._usage.call(),
            _limit_torch_threads(self.device),
            on_shared_stream(self.device),
            translate_out_of_memory(),
        ):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Let transformers create its empty cache of tensors only where something needs it before the first call.

        Creating it takes milliseconds, and the first call of an accelerated model returns a new cache anyway. Only
        decoding methods that access the cache before that call, options about caches, and a cache passed by the caller
        need transformers' preparation.
        """
        cache_options = (generation_config.cache_implementation, generation_config.prefill_chunk_size)
        cache_given = model_kwargs.get("past_key_values") is not None
        if cache_given or any(cache_options) or generation_mode not in MODES_WITHOUT_EMPTY_CACHE:
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Return the 2D mask unchanged: the graph itself derives the mask that its attention needs.

        Transformers calls this for static caches and sliding windows, and would replace the mask by a 4D one.
        """
        return attention_mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on new tokens; implemented by the subclasses."""
        raise NotImplementedError

    def _as_asked(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """Return the output, or its values as a tuple where the caller or the config asks for that."""
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _run_decoder(
        self, inputs: Mapping[str, Tensor], cache: Cache | None, use_cache: bool | None
    ) -> tuple[Tensor, Cache | None]:
        """Run the decoder on new tokens.

        Args:
            inputs: Inputs of the decoder.
            cache: Caches of the tokens before. A cache of tensors is filled in place, as transformers' models do.
            use_cache: False computes the caches but doesn't return new ones.

        Returns:
            Logits [batch, new, vocabulary], and the caches.
        """
        encoder_decoder = bool(self.config.is_encoder_decoder)
        with self._usage.call():
            state = state_of(cache)
            if state is not None:
                return self.runtime.decode(inputs, state), cache
            if cache is None or is_empty(cache):
                logits, state = self.runtime.prefill(inputs)
            else:
                state = self.runtime.resume(tensors_of(cache), inputs)
                logits = self.runtime.decode(inputs, state)
        if cache is not None:
            fill(cache, state, encoder_decoder)
        elif use_cache is not False:
            cache = cache_over(state, encoder_decoder)
        return logits, cache

    def close(self) -> None:
        """Free the sessions, once the calls of other threads have ended. Further calls raise `RuntimeError`."""
        if self._usage.close():
            self.runtime.close()

    def __enter__(self) -> "AcceleratedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
            arguments.check_ids("decoder_input_ids", decoder_input_ids, self._vocabulary)
            if hidden is None:
                hidden = self._encode(main_input, attention_mask)
            mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
            inputs |= {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        logits, cache = self._run_decoder(inputs, past_key_values, use_cache)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else _token_loss(logits, labels),
            logits=logits,
            past_key_values=cache,  # type: ignore[arg-type]  # typed more narrowly than `generate` needs
            encoder_last_hidden_state=hidden,
        )
        return self._as_asked(output, return_dict)

    def _encode(self, main_input: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return the encoder's last hidden state, [batch, source, width]."""
        if main_input is None:
            raise ValueError(f"either {self.main_input_name} or encoder_outputs is needed")
        hidden: Tensor = self._encoder(main_input, attention_mask=attention_mask)[0]
        return hidden

    def _decode_inputs(
        self, model_kwargs: Mapping[str, Any], state: State, max_new_tokens: int
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """Return a function from new ids to decode inputs, which here are the ids alone."""
        return lambda ids: {"input_ids": ids}


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

    def _decode_inputs(
        self, model_kwargs: Mapping[str, Any], state: State, max_new_tokens: int
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """Return a function from new ids to decode inputs; its mask and positions advance by one token per call.

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
        position = position_ids[:, -1:] - 1  # [batch or 1, 1]: of the last token in the caches

        def inputs_for(ids: Tensor) -> Mapping[str, Tensor]:
            nonlocal length, position
            position = position + 1
            inputs = decoder_inputs(ids, full_mask[:, :length], 1, position)
            length += 1
            return inputs

        return inputs_for


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [batch, length, vocabulary] where labels [batch, length] aren't -100."""
    return cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=-100)


@contextmanager
def _limit_torch_threads(device: torch.device) -> Iterator[None]:
    """Run torch's operators on one thread, if the device is the CPU.

    Its idle threads would otherwise spin on the cores that ONNX Runtime computes on. Measured on 2 cores, T5-small
    dimensions, 4 beams, 64 tokens: 0.83 s with this limit, 1.15 s without.
    """
    with one_openmp_thread() if device.type == "cpu" else nullcontext():
        yield
