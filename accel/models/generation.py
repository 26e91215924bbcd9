"""Models without PyTorch weights that run transformers' `generate` over any runtime.

`forward` calls the runtime's graphs. `generate`, all its options and all its decoding methods come from transformers'
`GenerationMixin`; `DecodingLoops` replaces the loops of greedy search, sampling and beam search.

Interfaces of transformers that `accel.models` relies on beyond its documented ones. pyproject.toml accepts transformers
5.17 to 5.x, and the code was read against 5.23: check this list before raising the bound.

- Overridden methods, which `generate` calls with the arguments that the overrides name: `_sample` and `_beam_search`
  (decoding/loops.py), `_prepare_cache_for_generation`, `create_masks_for_generate`, `prepare_inputs_for_generation`.
- Inherited methods that the overrides call: `_sample`, `_beam_search`, `_prepare_cache_for_generation`, `_prefill`
  (which runs the prompt and returns the outputs of `forward`), and `_update_model_kwargs_for_generation`.
- Attributes and methods that `GenerationMixin` expects of the class it is mixed into: `main_input_name`,
  `base_model_prefix`, `_is_stateful`, `config`, `generation_config`, `device`, `dtype`, `can_generate`,
  `is_remote_code`, `get_encoder`, `get_experts_implementation`, and the parameters' names of `forward` and of
  `prepare_inputs_for_generation`, which it reads with `inspect.signature`.
- Methods and properties that it calls on a cache: all those that `StateCache` overrides.
- Attributes that accel reads: `GenerationConfig._pad_token_tensor` (decoding/token_selector.py); `eos_token_id`,
  `min_length`, `min_new_tokens` and `prompt_length_to_skip` of logits processors (decoding/processors.py); the auto
  classes' `_model_mapping` and the model classes' `_is_stateful` (model_class.py).
- Generation mixins of transformers' model classes, such as `WhisperGenerationMixin`, become base classes of our models;
  overrides of `prepare_inputs_for_generation` in model classes, such as Phi-3's, run on an instance of the model class
  without modules, for which `device` and `dtype` are set as plain attributes (see `model_over`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from accel.models.decoding.loops import PREPARE_INPUTS, DecodingLoops
from accel.models.model_class import model_class
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


class StateCache(Cache):
    """Transformers cache without tensors of its own: a view of a runtime's state."""

    is_compileable = False

    def __init__(self, state: State) -> None:
        super().__init__(layers=[])
        self.state = state

    def __len__(self) -> int:
        return len(self.state.views()) // 2

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of decoder tokens in the caches, the same for all layers."""
        return self.state.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1, transformers' value for a cache without a maximum length."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of sequences, beams counted."""
        return self.state.batch

    @property
    def is_initialized(self) -> bool:
        """True: a state exists only after a prefill."""
        return True

    @property
    def is_croppable(self) -> bool:
        """True: every state supports `crop`."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """False: sliding windows are masks inside the graph, and the caches keep all tokens."""
        return [False]

    @property
    def self_attention_cache(self) -> DynamicCache:
        """Self-attention caches of an encoder-decoder model, valid until the next call of the decoder."""
        return self._half(0)

    @property
    def cross_attention_cache(self) -> DynamicCache:
        """Cross-attention caches of an encoder-decoder model, valid until the next call of the decoder."""
        return self._half(1)

    def _half(self, half: int) -> DynamicCache:
        """Return the first (0) or second (1) half of the state's tensors, keys and values in turn."""
        tensors = list(self.state.views().values())
        selected = tensors[half * len(tensors) // 2 : (half + 1) * len(tensors) // 2]
        return DynamicCache(list(zip(selected[::2], selected[1::2], strict=True)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i continue from what was sequence `beam_idx[i]`; beam_idx: [batch]."""
        self.state.reorder(beam_idx)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` decoder tokens, or remove the last `-tokens` where it is negative or zero."""
        self.state.crop(self.state.length + tokens if tokens <= 0 else tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies next to each other."""
        self.state.expand(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`: [new batch]."""
        self.state.select(indices)


class Encoder:
    """Callable that `generate` gets from `get_encoder` and runs once per input.

    Args:
        runtime: Runtime whose encoder graph is called.
        main_input_name: Name of the first positional argument: `input_ids`, or `input_features` for speech.
    """

    def __init__(self, runtime: Runtime[Any], main_input_name: str) -> None:
        self.runtime = runtime
        self.main_input_name = main_input_name

    def forward(self, *args: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Run the encoder.

        Args:
            args: The main input, ids [batch, source] or features [batch, ...], unless it is given by name.
            attention_mask: [batch, source], 0 at padding; None for inputs without padding.
            kwargs: Further inputs by name. All that are no tensors are ignored.

        Returns:
            The `last_hidden_state`: [batch, source, width].
        """
        inputs: dict[str, Tensor] = {}
        if args:
            inputs[self.main_input_name] = args[0]
        inputs |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        if attention_mask is None:
            main_input = inputs[self.main_input_name]
            attention_mask = main_input.new_ones(main_input.shape[:2], dtype=torch.int64)
        # the runtime drops inputs that the graph doesn't have, as the mask of an encoder without one
        encoded = self.runtime.encode(inputs | {"attention_mask": attention_mask})
        return BaseModelOutput(last_hidden_state=encoded["last_hidden_state"])

    __call__ = forward


class AcceleratedModel(DecodingLoops, GenerationMixin):
    """Base class of models without PyTorch weights. `generate` and all its options come from transformers.

    Args:
        runtime: Runs the graphs. The model owns it and closes it.
        config: The Hugging Face config of the exported model.
        generation_config: Defaults for `generate`.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        self.runtime = runtime
        self.config = config
        self.generation_config = generation_config
        self.device = runtime.device
        self.dtype = runtime.dtype

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate`, with every option and decoding method it has.

        Args:
            args: As for transformers' `generate`. Tensors must be on the model's device.
            kwargs: Likewise.

        Returns:
            As transformers' `generate`: token ids [batch, length], or a `ModelOutput` with `return_dict_in_generate`.

        Raises:
            DeviceMemoryError: The device is out of memory. The model stays usable.
        """
        with _limit_torch_threads(self.device), on_shared_stream(self.device), translate_out_of_memory():
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

    def can_generate(self) -> bool:
        """Return True: accel exports models with `generate` only."""
        return True

    def is_remote_code(self) -> bool:
        """Return False: the model runs no code from the hub."""
        return False

    def get_experts_implementation(self) -> Mapping[str, str]:
        """Return no implementations: experts are part of the graph."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on new tokens; implemented by the subclasses."""
        raise NotImplementedError

    def _prefill_or_resume(self, inputs: Mapping[str, Tensor], cache: Cache | None) -> tuple[Tensor, Any]:
        """Return logits and a new state, after the tokens in a transformers cache of tensors if it holds any."""
        if cache is None or cache.get_seq_length() == 0:
            return self.runtime.prefill(inputs)
        state = self.runtime.resume(_cache_tensors(cache), inputs)
        return self.runtime.decode(inputs, state), state

    def close(self) -> None:
        """Free the sessions."""
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
        self._encoder = Encoder(runtime, self.main_input_name)

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """Return the encoder, which is the same for every modality."""
        return self._encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Run the decoder on new tokens, after the encoder where its outputs are not given.

        Args:
            input_ids: Encoder input, [batch, source].
            attention_mask: Mask of the encoder input, [batch, source].
            decoder_input_ids: New decoder tokens, [batch, new].
            encoder_outputs: Outputs of an earlier call of the encoder; its first item is [batch, source, width].
            past_key_values: Caches of the decoder tokens before the new ones: those of an earlier call, or a
                transformers cache of tensors.
            use_cache: False returns no caches.
            output_attentions: Not supported.
            output_hidden_states: Not supported.
            kwargs: The main input, where it is not `input_ids`; a `decoder_attention_mask` without zeros.

        Returns:
            Logits [batch, new, vocabulary], caches, and the encoder's last hidden state.

        Raises:
            ValueError: An input is missing, attentions or hidden states are asked for, or the mask hides decoder
                tokens.
        """
        _reject_unavailable_outputs(output_attentions, output_hidden_states)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids is missing")
        if isinstance(past_key_values, StateCache):
            logits = self.runtime.decode({"input_ids": decoder_input_ids}, past_key_values.state)
            # transformers types the cache more narrowly than its own `generate` needs
            return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]
        decoder_mask = kwargs.get("decoder_attention_mask")
        if decoder_mask is not None and not bool(decoder_mask.all()):
            raise ValueError(
                "decoder_attention_mask has zeros, but an exported decoder attends to all decoder tokens: "
                "leave the mask out and pass only tokens to attend to"
            )
        if encoder_outputs is None:
            main_input = input_ids if self.main_input_name == "input_ids" else kwargs.get(self.main_input_name)
            if main_input is None:
                raise ValueError(f"either {self.main_input_name} or encoder_outputs is needed")
            encoder_outputs = self._encoder(main_input, attention_mask=attention_mask)
        hidden = encoder_outputs[0]  # [batch, source, width]
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
        inputs = {"input_ids": decoder_input_ids, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        logits, state = self._prefill_or_resume(inputs, past_key_values)
        cache = StateCache(state) if use_cache is not False else None
        return Seq2SeqLMOutput(logits=logits, past_key_values=cache, encoder_last_hidden_state=hidden)  # type: ignore[arg-type]

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run the decoder on new tokens.

        Args:
            input_ids: New tokens, [batch, new].
            attention_mask: [batch, past + new], 0 at padding; None for inputs without padding.
            position_ids: Positions of the new tokens, [batch, new]; None to count the mask's ones.
            past_key_values: Caches of the tokens before the new ones: those of an earlier call, or a transformers cache
                of tensors.
            use_cache: False returns no caches, except where `past_key_values` are those of an earlier call.
            logits_to_keep: Number of last tokens to return logits for; 0 for all.
            output_attentions: Not supported.
            output_hidden_states: Not supported.

        Returns:
            Logits [batch, `logits_to_keep` or new, vocabulary] and caches.

        Raises:
            ValueError: `input_ids` is missing, or attentions or hidden states are asked for.
        """
        _reject_unavailable_outputs(output_attentions, output_hidden_states)
        if input_ids is None:
            raise ValueError("input_ids is missing")
        batch, new = input_ids.shape
        cache = past_key_values if isinstance(past_key_values, StateCache) else None
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = input_ids.new_ones(batch, past + new) if attention_mask is None else attention_mask
        inputs = decoder_inputs(input_ids, mask, logits_to_keep, position_ids)
        if cache is not None:
            logits = self.runtime.decode(inputs, cache.state)
        else:
            logits, state = self._prefill_or_resume(inputs, past_key_values)
            cache = StateCache(state) if use_cache is not False else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

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


def _reject_unavailable_outputs(*requested: bool | None) -> None:
    """Raise `ValueError` if an output is requested that an exported graph doesn't return."""
    if any(requested):
        raise ValueError(
            "output_attentions and output_hidden_states are not supported: "
            "an exported model returns logits and caches, no attentions and no hidden states"
        )


def _cache_tensors(cache: Any) -> list[Tensor]:
    """Return keys and values of a transformers cache of tensors, self-attention caches first.

    Raises `ValueError` where layers hold different numbers of tokens, as with sliding windows: the graph needs all.
    """
    parts = [cache]
    if hasattr(cache, "cross_attention_cache"):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    tensors = []
    for part in parts:
        lengths = {layer.keys.shape[2] for layer in part.layers}  # keys: [B, H, S, D]
        if len(lengths) > 1:
            raise ValueError(
                f"past_key_values: the layers of a {type(cache).__name__} hold different numbers of tokens, "
                f"{sorted(lengths)}: pass a cache whose layers all hold every token, as a DynamicCache without a config"
            )
        for layer in part.layers:
            tensors += [layer.keys, layer.values]
    return tensors


class ModelStructureMixin:
    """Mixin for models whose transformers class wraps `generate` in a loop of its own, as speech models do.

    Such a loop reads the structure of the model, such as a convolution's stride. It is looked up in an instance of the
    transformers class on the meta device, without weights, which is built when it is first needed.
    """

    transformers_class: Any
    config: PretrainedConfig

    @cached_property
    def meta_model(self) -> torch.nn.Module:
        """Instance of the transformers class on the meta device."""
        with torch.device("meta"):
            model: torch.nn.Module = self.transformers_class(self.config)
        return model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.meta_model, name)


def model_over(
    runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig
) -> AcceleratedModel:
    """Return the model that `config` describes, over `runtime`.

    Its class is created here, since it depends on the transformers class of the config:

    - It has the name of the transformers class, by which transformers' pipelines look a model up.
    - Generation mixins of the transformers class, which have no weights, become its base classes. Whisper's adds
      timestamps and long audio. Their `super()` calls reach `GenerationMixin` as they do in transformers.
    - If the transformers class has no such mixin and overrides `prepare_inputs_for_generation` itself, that override is
      used. Phi-3's drops the caches where its rotary embedding is rescaled.

    Args:
        runtime: Runs the model's graphs.
        config: Hugging Face config. With `is_encoder_decoder`, the result is an `EncoderDecoderModel`, otherwise a
            `DecoderOnlyModel`.
        generation_config: Defaults for `generate`.
    """
    base = EncoderDecoderModel if config.is_encoder_decoder else DecoderOnlyModel
    transformers_class = model_class(config)
    members = {
        "main_input_name": getattr(transformers_class, "main_input_name", base.main_input_name),
        "transformers_class": transformers_class,
    }
    bases: list[type] = [base]
    generation_mixins = _generation_mixins(transformers_class)
    prepare_inputs = getattr(transformers_class, PREPARE_INPUTS, None)
    if generation_mixins:
        bases += [*generation_mixins, ModelStructureMixin]
    elif prepare_inputs is not None and prepare_inputs is not getattr(GenerationMixin, PREPARE_INPUTS):
        members[PREPARE_INPUTS] = _delegate_to_transformers(prepare_inputs, transformers_class)
    name = getattr(transformers_class, "__name__", base.__name__)
    model: AcceleratedModel = type(name, tuple(bases), members)(runtime, config, generation_config)
    return model


def _generation_mixins(transformers_class: Any) -> list[type]:
    """Return the base classes with generation methods and without weights, except `GenerationMixin` itself."""
    mixins = []
    for ancestor in getattr(transformers_class, "__mro__", ()):
        has_weights = issubclass(ancestor, torch.nn.Module)
        if issubclass(ancestor, GenerationMixin) and not has_weights and ancestor is not GenerationMixin:
            mixins.append(ancestor)
    return mixins


def _delegate_to_transformers(prepare_inputs: Callable[..., Any], transformers_class: Any) -> Callable[..., Any]:
    """Return `transformers_class.prepare_inputs_for_generation` as a method for one accelerated model.

    The override calls `super()`, which Python allows only on instances of the override's own class, and an accelerated
    model is none. So the override runs on such an instance without modules and weights, which has the accelerated
    model's config, device, dtype and mask function.
    """

    class InputPreparer(transformers_class):
        """Instance of the transformers class that can prepare inputs and do nothing else."""

        device = None  # plain attributes replace properties that need parameters
        dtype = None
        create_masks_for_generate = staticmethod(AcceleratedModel.create_masks_for_generate)

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)  # not transformers' constructor, which creates the weights

    preparer: Any = InputPreparer()

    @wraps(prepare_inputs)  # `generate` reads the parameters' names from the signature
    def prepare_inputs_for_generation(model: AcceleratedModel, *args: Any, **kwargs: Any) -> Any:
        attributes = vars(preparer)  # `nn.Module` makes ordinary assignments slow
        attributes["config"], attributes["generation_config"] = model.config, model.generation_config
        attributes["device"], attributes["dtype"] = model.device, model.dtype
        return prepare_inputs(preparer, *args, **kwargs)

    return prepare_inputs_for_generation


@contextmanager
def _limit_torch_threads(device: torch.device) -> Iterator[None]:
    """Run torch's operators on one thread, if the device is the CPU.

    Its idle threads would otherwise spin on the cores that ONNX Runtime computes on. Measured on 2 cores, T5-small
    dimensions, 4 beams, 64 tokens: 0.83 s with this limit, 1.15 s without.
    """
    with one_openmp_thread() if device.type == "cpu" else nullcontext():
        yield
