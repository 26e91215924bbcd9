"""PyTorch's own model compiled with `max-autotune` over static caches, under accel's decoding loops.

The strongest of what a user of transformers gets without model code of their own: Inductor tunes the kernels of a
decode step and, on a GPU, replays it as a CUDA graph (https://docs.pytorch.org/docs/stable/generated/torch.compile.html).
The loop around it is the one that accel's models have, so no token waits for the host. Encoder and prompt are not
compiled, as in transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from accel.config.engines import INDUCTOR
from accel.errors import AccelError
from accel.models.factory import model_over
from accel.models.generation import AcceleratedModel
from accel.runtime.layout import IDS, MASK, POSITION_IDS
from accel.runtime.protocol import C

MODE = "max-autotune"
MODE_WITHOUT_GRAPHS = "max-autotune-no-cudagraphs"  # on the CPU, where there are no CUDA graphs
HIDDEN, HIDDEN_MASK = "encoder_hidden_states", "encoder_attention_mask"
ONLY = "this baseline decodes by greedy search, sampling and beam search only"

BufferKey = tuple[int, int, int]
"""Rows, tokens, and source tokens that static caches have room for."""


class StaticBuffers:
    """Static caches, and the inputs of a decode step, at constant addresses.

    Args:
        model: The model that computes over them.
        inputs: Inputs of one token: ids [rows, 1] and, of a decoder-only model, the mask and positions.
        constants: Beside an encoder its output [rows, source, width] and mask [rows, source]; else nothing.
        tokens: Tokens that the caches have room for.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor], tokens: int
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        self.tokens = tokens
        self.cache: Cache = StaticCache(config, tokens)
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise AccelError("torch_compiled_max can't run a model with a sliding window: leave it out")
        if constants:
            self.cache = EncoderDecoderCache(self.cache, StaticCache(config, constants[HIDDEN].shape[1]))
        rows = len(inputs[IDS])
        self.inputs = {name: torch.zeros_like(tensor) for name, tensor in inputs.items() if name != MASK}
        if MASK in inputs:
            self.inputs[MASK] = inputs[MASK].new_zeros(rows, tokens)
        self.constants = {name: torch.zeros_like(tensor) for name, tensor in constants.items()}
        for tensor in (*self.inputs.values(), *self.constants.values()):
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph reads them in place

    def write(self, cache: Cache, constants: Mapping[str, Tensor]) -> None:
        """Take over the caches of a prompt, and what stays the same for its generation."""
        for own, other in zip(_parts(self.cache), _parts(cache), strict=True):
            own.reset()
            for index, layer in enumerate(other.layers):
                if layer.is_initialized:
                    own.update(layer.keys, layer.values, index)
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache.is_updated = dict.fromkeys(range(len(self.cache.cross_attention_cache.layers)), True)
        for name, tensor in constants.items():
            self.constants[name].copy_(tensor)

    def write_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of one token; the mask is as long as the tokens so far, and the model hides what follows."""
        for name, buffer in self.inputs.items():
            if name == MASK:
                buffer[:, : inputs[name].shape[1]].copy_(inputs[name])
            else:
                buffer.copy_(inputs[name])

    def reorder(self, index: Tensor) -> None:
        """Continue every row i from row `index[i]`, a beam of the same input: of self-attention alone, in place."""
        for layer in _parts(self.cache)[0].layers:
            if layer.is_initialized:
                layer.keys.copy_(layer.keys.index_select(0, index))
                layer.values.copy_(layer.values.index_select(0, index))


def _parts(cache: Cache) -> list[Any]:
    """Return the self-attention cache and, beside an encoder, the cross-attention cache."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


class CompiledState:
    """Caches of one generation: dynamic after the prompt, static from the first decode step on.

    Args:
        runtime: Runtime that gives and takes static buffers.
        cache: The prompt's caches.
        constants: See `StaticBuffers`.
        batch: Rows.
        length: Tokens in the caches.
    """

    def __init__(
        self, runtime: "CompiledRuntime", cache: Cache, constants: Mapping[str, Tensor], batch: int, length: int
    ) -> None:
        self._runtime, self._cache, self._constants = runtime, cache, dict(constants)
        self.batch, self.length = batch, length
        self._reserved = 0
        self._buffers: StaticBuffers | None = None

    def __del__(self) -> None:
        if self._buffers is not None:
            self._runtime.release(self._buffers)

    def static(self, inputs: Mapping[str, Tensor]) -> StaticBuffers:
        """Return the static buffers, with the prompt's caches in them."""
        if self._buffers is None:
            tokens = max(self._reserved, self.length + 1)
            self._buffers = self._runtime.take(inputs, self._constants, tokens)
            self._buffers.write(self._cache, self._constants)
            del self._cache  # `_buffers` hold the caches now
        return self._buffers

    def reorder(self, index: Tensor) -> None:
        """Continue every sequence i from sequence `index[i]`, a beam of the same input."""
        if self._buffers is not None:
            self._buffers.reorder(index)
        else:
            self._cache.reorder_cache(index)  # type: ignore[arg-type]  # annotated as a LongTensor, which nothing is

    def reserve(self, tokens: int) -> None:
        """Let the static caches have room for `tokens` tokens."""
        self._reserved = tokens

    def expand(self, times: int) -> None:
        """Repeat every sequence of the prompt `times` times: [batch, ...] -> [batch * times, ...]."""
        self._cache.batch_repeat_interleave(times)
        self._constants = {name: tensor.repeat_interleave(times, 0) for name, tensor in self._constants.items()}
        self.batch *= times

    def select(self, index: Tensor) -> None:
        """Raise `AccelError`, as do the following: nothing that a benchmark generates needs them."""
        raise AccelError(ONLY)

    def crop(self, length: int) -> None:
        """Raise `AccelError`."""
        raise AccelError(ONLY)

    def copy(self) -> "CompiledState":
        """Raise `AccelError`."""
        raise AccelError(ONLY)

    def views(self) -> Mapping[str, Tensor]:
        """Return the caches by name, [batch, heads, length, head_size]; see `protocol.State.views`."""
        cache = self._cache if self._buffers is None else self._buffers.cache
        own, *cross = _parts(cache)
        views = {}
        for kind, part in (("decoder", own), *(("encoder", each) for each in cross)):
            for index, layer in enumerate(part.layers):
                if layer.is_initialized:
                    length = self.length if kind == "decoder" else layer.keys.shape[2]
                    views[f"past_key_values.{index}.{kind}.key"] = layer.keys[:, :, :length]
                    views[f"past_key_values.{index}.{kind}.value"] = layer.values[:, :, :length]
        return views


class CompiledRuntime:
    """Runtime over a model of PyTorch, whose decode steps are compiled. Implements `protocol.Runtime`.

    Args:
        model: The model, on its device. It keeps transformers' attention implementation.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device, self.dtype, self.engine = model.device, model.dtype, INDUCTOR
        self.exclusive, self.positions_from_mask = True, False
        self._mode = MODE if model.device.type == "cuda" else MODE_WITHOUT_GRAPHS
        self._step: Callable[..., Tensor] = torch.compile(self._logits, mode=self._mode, dynamic=False)
        self._spare: dict[BufferKey, StaticBuffers] = {}

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the encoder, which is not compiled."""
        return {"last_hidden_state": self.model.get_encoder()(**inputs).last_hidden_state}

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, CompiledState]:
        """Run the decoder without past, which is not compiled."""
        constants = {name: inputs[name] for name in (HIDDEN, HIDDEN_MASK) if name in inputs}
        text = self.model.config.get_text_config(decoder=True)
        cache: Cache = DynamicCache(config=text)
        if constants:
            cache = EncoderDecoderCache(cache, DynamicCache(config=text))
        logits = self._logits(inputs, constants, cache)
        return logits, CompiledState(self, cache, constants, *inputs[IDS].shape)

    def _logits(self, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor], cache: Cache) -> Tensor:
        """Return logits [rows, 1, vocabulary] of the last of the new tokens. This is what is compiled."""
        if constants:
            outputs = self.model(
                decoder_input_ids=inputs[IDS],
                encoder_outputs=(constants[HIDDEN],),
                attention_mask=constants[HIDDEN_MASK],
                past_key_values=cache,
                use_cache=True,
            )
        else:
            given = {name: inputs[name] for name in (IDS, MASK, POSITION_IDS) if name in inputs}
            outputs = self.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = outputs.logits
        return logits[:, -1:]

    def decode(self, inputs: Mapping[str, Tensor], state: CompiledState) -> Tensor:
        """Run the decoder over one new token, [rows, 1]. The first call for new shapes compiles it.

        Raises:
            AccelError: It can't be compiled, such as without a C++ compiler; or there are several new tokens.
        """
        if inputs[IDS].shape[1] != 1:
            raise AccelError(ONLY)
        taken = {name: inputs[name] for name in (IDS, MASK, POSITION_IDS) if name in inputs}
        buffers = state.static(taken)
        buffers.write_inputs(taken)
        if self._mode == MODE:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            logits = self._step(buffers.inputs, buffers.constants, buffers.cache)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise AccelError(f"torch_compiled_max: torch.compile can't compile the decoder here: {reason}") from error
        state.length += 1
        return logits.clone()  # the next replay overwrites them

    def decode_and_select(
        self, inputs: Callable[[], Mapping[str, Tensor]], state: CompiledState, selection: C
    ) -> C | None:
        """Return None: the loop selects from the logits of `decode`, on the device as well."""
        return None

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> CompiledState:
        """Raise `AccelError`: nothing that a benchmark generates needs this."""
        raise AccelError(ONLY)

    def take(self, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor], tokens: int) -> StaticBuffers:
        """Return buffers of these shapes: those of an earlier generation, for which all is compiled, or new ones."""
        key = self._key(inputs, constants, tokens)
        return self._spare.pop(key, None) or StaticBuffers(self.model, inputs, constants, tokens)

    def release(self, buffers: StaticBuffers) -> None:
        """Keep buffers for a later generation."""
        self._spare[self._key(buffers.inputs, buffers.constants, buffers.tokens)] = buffers

    def _key(self, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor], tokens: int) -> BufferKey:
        """Return what buffers must agree in to be interchangeable."""
        return len(inputs[IDS]), tokens, constants[HIDDEN].shape[1] if constants else 0

    def close(self) -> None:
        """Free the buffers."""
        self._spare.clear()


def compiled_model(model: PreTrainedModel) -> AcceleratedModel:
    """Return a model with accel's `generate` over `model`, whose decode steps are compiled at first use.

    Raises:
        AccelError: Later, in `generate`: the model has a sliding window, or can't be compiled here.
    """
    return model_over(CompiledRuntime(model), model.config, model.generation_config)
