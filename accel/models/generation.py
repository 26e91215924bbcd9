"""Models without PyTorch weights that run transformers' `generate` over any runtime.

`forward` calls the runtime's graphs. `generate`, all its options and all its decoding methods come from transformers'
`GenerationMixin`; `DecodingLoops` replaces the loops of greedy search, sampling and beam search.

Interfaces of transformers that `accel.models` relies on beyond its documented ones. pyproject.toml accepts transformers
5.17 to 5.x, and the code was read against 5.23: check this list before raising the bound.

- Overridden methods, which `generate` calls with the arguments that the overrides name: `_sample`, `_beam_search` and
  `_get_candidate_generator` (decoding/loops.py), `_prepare_cache_for_generation`, `create_masks_for_generate`,
  `prepare_inputs_for_generation`. A candidate generator has `get_candidates` and `update_candidate_strategy`.
- Inherited methods that the overrides call: `_sample`, `_beam_search`, `_prepare_cache_for_generation`, `_prefill`
  (which runs the prompt and returns the outputs of `forward`), `_update_model_kwargs_for_generation`, and
  `_valid_auto_compile_criteria`.
- Attributes and methods that `GenerationMixin` expects of the class it is mixed into: `main_input_name`,
  `base_model_prefix`, `_is_stateful`, `config`, `generation_config`, `device`, `dtype`, `can_generate`,
  `is_remote_code`, `get_encoder`, `get_experts_implementation`, and the parameters' names of `forward` and of
  `prepare_inputs_for_generation`, which it reads with `inspect.signature`.
- Methods that it calls on a cache, and that a cache calls on its layers: all those that `cache.StateLayer` overrides.
- What `generate` prepares a generation with, which decoding/sequence.py does for a row of a running batch:
  `_prepare_generation_config`, `_prepare_special_tokens`, `_prepare_decoder_input_ids_for_generation`,
  `_prepare_generated_length`, `_get_logits_processor`.
- `GenerationMixin._get_logits_processor`, called on an object that has a config only, with
  `GenerationConfig._eos_token_tensor` set: option_check.py tries options on it before anything is exported.
- Attributes that accel reads: `GenerationConfig._pad_token_tensor` (decoding/token_selector.py); the parameters of
  logits processors, which filters of accel's own take the place of (decoding/processors.py); the auto classes'
  `_model_mapping` and the model classes' `_is_stateful` (model_class.py).
- Generation mixins of transformers' model classes, such as `WhisperGenerationMixin`, become base classes of our models;
  overrides of `prepare_inputs_for_generation` in model classes, such as Phi-3's, run on an instance of the model class
  without modules, for which `device` and `dtype` are set as plain attributes (see factory.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.generic import ModelOutput

from accel.config.engines import INDUCTOR
from accel.models.cache import cache_over, fill, is_empty, state_of, tensors_of
from accel.models.decoding.loops import DecodingLoops
from accel.models.module import InferenceModule
from accel.models.prompt_cache import Prefix, PromptCache
from accel.models.rows import Rows, open_rows
from accel.models.usage import Usage
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.protocol import Runtime
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

            past_key_values: Among the options, a `PromptCache` of tokens that all prompts begin with.

        Returns:
            As transformers' `generate`: token ids [batch, length], or a `ModelOutput` with `return_dict_in_generate`.

        Raises:
            DeviceMemoryError: The device is out of memory. The model stays usable.
            RuntimeError: The model is closed.
        """
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PromptCache):
            prompts = next(
                (ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if ids is not None), None
            )
            kwargs["past_key_values"] = cache.prefix_of(prompts, kwargs.get("attention_mask"))
        with self.call():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def call(self) -> Iterator[None]:
        """Return a context for one call from outside: its turn, threads and stream, and errors about memory.

        Raises:
            DeviceMemoryError: The device is out of memory.
            RuntimeError: The model is closed.
        """
        with (
            self._usage.call(),
            _limit_torch_threads(self.device, self.runtime.engine),
            on_shared_stream(self.device),
            translate_out_of_memory(),
        ):
            yield

    def rows(self, capacity: int, max_length: int, source_length: int | None = None) -> Rows:
        """Open a running batch, whose rows begin and end independently of each other, as a server needs it.

        The caches of all rows are allocated now. On a GPU the decode step is captured as a CUDA graph.

        Args:
            capacity: Number of rows.
            max_length: Tokens that each row has room for, its prompt counted; rounded up to one of the runtime's
                `buckets`.
            source_length: Beside an encoder of text, the longest input of a row, in tokens; by default `max_length`.

        Returns:
            The rows. Close them, or use them as a context manager, to free their caches for other calls.

        Raises:
            AccelError: The model was opened without static caches, can't have rows of different lengths or has fewer
                positions; or `capacity` isn't one of the runtime's `capture_batch_sizes`.
            DeviceMemoryError: The device has too little memory.
            ValueError: A number is less than 1.
            RuntimeError: The model is closed.
        """
        return open_rows(self, capacity, max_length, max_length if source_length is None else source_length)

    def prefill_inputs(self, **inputs: Any) -> Mapping[str, Tensor]:
        """Return the decoder's inputs for the first call of a generation; implemented by the subclasses."""
        raise NotImplementedError

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
        prefix = model_kwargs.get("past_key_values")
        if isinstance(prefix, Prefix):
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = prefix.start(rows)
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


@contextmanager
def _limit_torch_threads(device: torch.device, engine: str) -> Iterator[None]:
    """Run torch's operators on one thread, if the device is the CPU and ONNX Runtime computes the model.

    Its idle threads would otherwise spin on the cores that ONNX Runtime computes on. Measured on 2 cores, T5-small
    dimensions, 4 beams, 64 tokens: 0.83 s with this limit, 1.15 s without.
    """
    with one_openmp_thread() if device.type == "cpu" and engine != INDUCTOR else nullcontext():
        yield
