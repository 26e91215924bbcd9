"""The model that Hugging Face `generate` drives, over any runtime."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from types import CellType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from accel.models.decoding.loops import PREPARE, DecodingLoops
from accel.models.model_class import model_class
from accel.runtime.decoder_inputs import decoder_inputs, positions
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.protocol import Runtime, State
from accel.runtime.streams import on_shared_stream
from accel.system.process_state import one_openmp_thread

Generates: TypeAlias = Any
"""A model with transformers' `generate`: PyTorch's own or ours. Its mixin hides the method from type checkers."""

CACHE_LATER = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}


class StateCache(Cache):
    """A transformers cache that holds no tensors of its own: everything is asked of the runtime's state."""

    is_compileable = False

    def __init__(self, state: State) -> None:
        super().__init__(layers=[])
        self.state = state

    def __len__(self) -> int:
        return len(self.state.views()) // 2

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.state.batch

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def self_attention_cache(self) -> DynamicCache:
        """In models with an encoder, the decoder's own keys and values as they are now."""
        return self._pairs(0)

    @property
    def cross_attention_cache(self) -> DynamicCache:
        """In models with an encoder, the keys and values of its output."""
        return self._pairs(1)

    def _pairs(self, half: int) -> DynamicCache:
        tensors = list(self.state.views().values())
        kept = tensors[half * len(tensors) // 2 : (half + 1) * len(tensors) // 2]
        return DynamicCache(list(zip(kept[::2], kept[1::2], strict=True)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx)

    def crop(self, tokens: int) -> None:
        """Negative: forget that many of the last tokens, as `generate` asks. Positive: keep that many."""
        self.state.crop(self.state.length + tokens if tokens <= 0 else tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.expand(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.select(indices)


class Encoder:
    """What `generate` calls once per input."""

    def __init__(self, runtime: Runtime[Any], main_input_name: str) -> None:
        self.runtime = runtime
        self.main_input_name = main_input_name

    def forward(self, *args: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Ids [batch, source] and mask, or features -> last_hidden_state [batch, source, width]."""
        inputs = dict(zip([self.main_input_name], args, strict=False))
        inputs |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        given = inputs[self.main_input_name]
        # what an encoder without a mask does not take is left out by the runtime
        mask = given.new_ones(given.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
        encoded = self.runtime.encode(inputs | {"attention_mask": mask})
        return BaseModelOutput(last_hidden_state=encoded["last_hidden_state"])

    __call__ = forward


class AcceleratedModel(DecodingLoops, GenerationMixin):
    """A model without PyTorch weights. `generate` and all its options come from transformers."""

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
        """Transformers' `generate`, with every option and decoding method it has. Inputs lie on the model's device.

        Raises `OutOfMemory` where the device has no room; the model stays usable.
        """
        with _cores_for_the_runtime(self.device), on_shared_stream(self.device), translate_out_of_memory():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Transformers makes empty caches of tensors, which takes it milliseconds. Ours is what the first call returns;
        only decoding methods that ask a cache something before that, and options about caches, need theirs.
        """
        about_caches = (generation_config.cache_implementation, generation_config.prefill_chunk_size)
        if model_kwargs.get("past_key_values") is not None or any(about_caches) or generation_mode not in CACHE_LATER:
            theirs: Any = super()
            given = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            theirs._prepare_cache_for_generation(*given)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The mask as it was given: a graph makes of it what its attention takes.

        Transformers asks for this where a cache has a fixed length or a window slides, and would lose the mask.
        """
        return attention_mask

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> Mapping[str, str]:
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _begin(self, inputs: Mapping[str, Tensor], cache: Cache | None) -> tuple[Tensor, Any]:
        """Logits and a state, from nothing or from what a transformers cache of tensors holds."""
        if cache is None or cache.get_seq_length() == 0:
            return self.runtime.prefill(inputs)
        state = self.runtime.resume(tensors(cache), inputs)
        return self.runtime.decode(inputs, state), state

    def close(self) -> None:
        """Free the sessions."""
        self.runtime.close()

    def __enter__(self) -> "AcceleratedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EncoderDecoderModel(AcceleratedModel):
    """Encodes once, then decodes token by token."""

    followed = frozenset({"attention_mask", "encoder_outputs", "past_key_values", "use_cache"})

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(runtime, config, generation_config)
        self._encoder = Encoder(runtime, self.main_input_name)

    def get_encoder(self, modality: str | None = None) -> Encoder:
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
        """One call of the decoder: ids [batch, new] -> logits [batch, new, vocabulary].

        Raises `ValueError` when attentions or hidden states are asked for, which an exported graph doesn't return, or
        decoder tokens are masked.
        """
        refuse(output_attentions, output_hidden_states)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids is missing")
        if isinstance(past_key_values, StateCache):
            logits = self.runtime.decode({"input_ids": decoder_input_ids}, past_key_values.state)
            return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]
        shown = kwargs.get("decoder_attention_mask")
        if shown is not None and not bool(shown.all()):
            raise ValueError("decoder_attention_mask hides tokens; an exported decoder looks at all that it was given")
        if encoder_outputs is None:
            given = input_ids if self.main_input_name == "input_ids" else kwargs.get(self.main_input_name)
            if given is None:
                raise ValueError(f"either {self.main_input_name} or encoder_outputs is needed")
            encoder_outputs = self._encoder(given, attention_mask=attention_mask)
        hidden = encoder_outputs[0]  # [batch, source, width]
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
        inputs = {"input_ids": decoder_input_ids, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        logits, state = self._begin(inputs, past_key_values)
        cache = StateCache(state) if use_cache is not False else None
        # transformers types the cache more narrowly than its own `generate` needs
        return Seq2SeqLMOutput(logits=logits, past_key_values=cache, encoder_last_hidden_state=hidden)  # type: ignore[arg-type]

    def _decoder_inputs(
        self, given: Mapping[str, Any], state: State, room: int
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        return lambda ids: {"input_ids": ids}


class DecoderOnlyModel(AcceleratedModel):
    """Continues what it is given. Shorter inputs of a batch are padded on the left."""

    followed = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})

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
        """Ids [batch, new], mask [batch, past + new] -> logits [batch, `logits_to_keep` or new, vocabulary].

        Raises `ValueError` when attentions or hidden states are asked for, which an exported graph doesn't return.
        """
        refuse(output_attentions, output_hidden_states)
        if input_ids is None:
            raise ValueError("input_ids is missing")
        batch, new = input_ids.shape
        cache = past_key_values if isinstance(past_key_values, StateCache) else None
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = input_ids.new_ones(batch, seen + new) if attention_mask is None else attention_mask
        inputs = decoder_inputs(input_ids, mask, logits_to_keep, position_ids)
        if cache is not None:
            logits = self.runtime.decode(inputs, cache.state)
        else:
            logits, state = self._begin(inputs, past_key_values)
            cache = StateCache(state) if use_cache is not False else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _decoder_inputs(
        self, given: Mapping[str, Any], state: State, room: int
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """The mask holds the next token already, and grows by one with each; so do the positions."""
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(state.batch, state.length + 1, dtype=torch.int64, device=self.device)
        whole = torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
        known = given.get("position_ids")
        lengths = itertools.count(mask.shape[1])
        places = positions(mask)[:, -1:] - 1 if known is None else known[:, -1:] - 1

        def inputs(ids: Tensor) -> Mapping[str, Tensor]:
            nonlocal places
            places = places + 1
            return decoder_inputs(ids, whole[:, : next(lengths)], 1, places)

        return inputs


def refuse(*asked: bool | None) -> None:
    """Raises `ValueError` if any is: what a graph doesn't return is not silently left out."""
    if any(asked):
        raise ValueError("an exported model returns logits and caches, no attentions and no hidden states")


def tensors(cache: Any) -> list[Tensor]:
    """Keys and values of a transformers cache that holds tensors, the decoder's own first.

    Raises `ValueError` where layers remember different lengths, as sliding windows do: what they forgot is needed.
    """
    crossed = hasattr(cache, "cross_attention_cache")
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if crossed else [cache]
    for part in parts:
        if len(kept := {layer.keys.shape[2] for layer in part.layers}) > 1:
            raise ValueError(f"past_key_values: the layers of a {type(cache).__name__} remember {sorted(kept)} tokens")
    return [tensor for part in parts for layer in part.layers for tensor in (layer.keys, layer.values)]


class OwnLoop:
    """Mixed into models whose transformers class brings a loop of its own around `generate`, as speech does.

    Such a loop asks the model for its structure (a convolution's stride, say). It is built without weights, once.
    """

    structure: Any  # the transformers class
    config: PretrainedConfig

    @cached_property
    def skeleton(self) -> torch.nn.Module:
        with torch.device("meta"):
            built: torch.nn.Module = self.structure(self.config)
        return built

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.skeleton, name)


def model_over(
    runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig
) -> AcceleratedModel:
    """The model that `config` describes, over `runtime`.

    What its transformers class does of its own in `generate` comes along: a mixin without weights, as speech has for
    its timestamps, and how the inputs of a call are prepared, as where positions are rescaled from some length on.
    """
    shape = EncoderDecoderModel if config.is_encoder_decoder else DecoderOnlyModel
    known = model_class(config)
    mixins = [base for base in getattr(known, "__mro__", ()) if issubclass(base, GenerationMixin)]
    own = [base for base in mixins if not issubclass(base, torch.nn.Module) and base is not GenerationMixin]
    members = {"main_input_name": getattr(known, "main_input_name", shape.main_input_name), "structure": known}
    # Pipelines look a model up by the name of its class.
    kind = type(getattr(known, "__name__", shape.__name__), (shape, *own, *([OwnLoop] if own else [])), members)
    prepares = next((vars(base)[PREPARE] for base in getattr(known, "__mro__", ()) if PREPARE in vars(base)), None)
    if prepares is not None and prepares is not vars(GenerationMixin)[PREPARE] and not own:
        setattr(kind, PREPARE, _moved(prepares, kind))
    made: AcceleratedModel = kind(runtime, config, generation_config)
    return made


def _moved(method: FunctionType, kind: type) -> FunctionType:
    """A method of another class as one of `kind`, so that its `super()` finds what follows `kind`."""
    cells = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
    closure = tuple(CellType(kind) if name == "__class__" else cell for name, cell in cells)
    moved = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, closure)
    moved.__kwdefaults__ = method.__kwdefaults__
    return moved


@contextmanager
def _cores_for_the_runtime(device: torch.device) -> Iterator[None]:
    """On the CPU, let torch work on one thread meanwhile: its others would spin on the cores the runtime computes on.

    Measured on 2 cores, T5-small dimensions, 4 beams, 64 tokens: 0.83 s with it, 1.15 s without.
    """
    with one_openmp_thread() if device.type == "cpu" else nullcontext():
        yield
