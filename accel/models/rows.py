"""A running batch whose rows are sequences of their own: a row is claimed, prefilled, stepped and released."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.models import arguments
from accel.models.prompt_cache import PromptCache
from accel.models.rope import angles_depend_on_length
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.rows import CacheRows
from accel.runtime.static_cache import StaticCacheRuntime

if TYPE_CHECKING:
    from accel.models.generation import AcceleratedModel


class Rows:
    """Rows of a running batch, opened by `AcceleratedModel.rows`. For one thread at a time.

    Each row has a length of its own. One can begin, or end, while the others are decoded, and gives the tokens that its
    sequence gives alone.

    Args:
        model: The model.
        runtime: Its runtime.
        cache: The rows' caches.
        capacity: Number of rows.

    Attributes:
        capacity: Number of rows.
        max_length: Largest number of tokens in a row, its prompt counted: at least what was asked for.
    """

    def __init__(self, model: "AcceleratedModel", runtime: StaticCacheRuntime, cache: CacheRows, capacity: int) -> None:
        self._model, self._runtime, self._cache = model, runtime, cache
        self.capacity, self.max_length = capacity, cache.bucket
        self._free = list(reversed(range(capacity)))  # the next one is at the end
        self._closed = False

    @property
    def free(self) -> int:
        """Number of rows that can be claimed."""
        return len(self._free)

    def length(self, row: int) -> int:
        """Return the number of tokens in a row, 0 before its prefill.

        Raises:
            ValueError: The row isn't claimed.
        """
        self._check(row)
        return self._cache.lengths.get(row, 0)

    def claim(self) -> int:
        """Reserve a row and return its number.

        Raises:
            AccelError: All rows are claimed.
            RuntimeError: The rows are closed.
        """
        self._check_open()
        if not self._free:
            raise AccelError(f"no row is free: all {self.capacity} are claimed. Release one, or open more")
        return self._free.pop()

    def prefill(self, row: int, **inputs: Any) -> Tensor:
        """Begin a sequence in a row; what the row held is lost. The other rows stay as they are.

        Args:
            row: A claimed row.
            inputs: One input of the model, as for `generate`: `input_ids` [length] or [1, length], or a speech model's
                features, and `attention_mask`. For an encoder-decoder also `encoder_outputs` in place of its input, and
                `decoder_input_ids` where its start token isn't all that it begins with; for a decoder-only model
                `past_key_values`, a `PromptCache` of tokens that the prompt begins with.

        Returns:
            Logits of the first new token, [vocabulary].

        Raises:
            ValueError: The row isn't claimed, or an input is missing, too long, or has a wrong type, shape or range.
            TypeError: An argument is unknown.
            DeviceMemoryError: The device is out of memory. The row is as before.
            RuntimeError: The rows or the model are closed.
        """
        self._check(row)
        prompt_cache = inputs.pop("past_key_values", None)
        with self._model.call():
            first_inputs = self._model.prefill_inputs(**inputs)
            batch, length = first_inputs["input_ids"].shape
            if batch != 1:
                raise ValueError(f"{batch} sequences were given: a row takes one")
            if not 0 < length <= self.max_length:
                raise ValueError(f"the prompt has {length} tokens, a row holds 1 to {self.max_length}: max_length")
            if prompt_cache is None:
                logits, state = self._runtime.dynamic.prefill(first_inputs)
            else:
                logits, state = self._continue(prompt_cache, first_inputs)
            self._cache.fill(row, state, first_inputs.get("attention_mask"))
        return logits[0, -1]

    def _continue(self, cache: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, DynamicCacheState]:
        """Run a prompt behind the tokens that it shares with a prompt cache."""
        if not isinstance(cache, PromptCache) or self._model.config.is_encoder_decoder:
            raise ValueError(
                f"past_key_values of type {type(cache).__name__}: a row begins without, or with a PromptCache made by "
                "model.cache_prompt, which decoder-only models have"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        prefix = cache.prefix_of(ids, mask)
        shared: Any = prefix.copy(1)
        state = shared.make_dynamic()
        return self._runtime.dynamic.decode(decoder_inputs(ids[:, prefix.length :], mask, 1), state), state

    def step(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Decode the next token of every prefilled row, each at its own position.

        Args:
            tokens: Ids of the vocabulary, int64 [capacity]. Those of rows that aren't prefilled are ignored.

        Returns:
            Logits [capacity, vocabulary]; without meaning in rows that aren't prefilled.

        Raises:
            ValueError: No row is prefilled, a row is full, or `tokens` has a wrong type, shape or range.
            RuntimeError: The rows or the model are closed.
        """
        self._check_open()
        lengths = self._cache.lengths
        tokens = torch.as_tensor(tokens)
        if tuple(tokens.shape) != (self.capacity,):
            raise ValueError(f"tokens has shape {list(tokens.shape)}, expected [{self.capacity}], one for each row")
        if not lengths:
            raise ValueError("no row is prefilled")
        full = sorted(row for row, length in lengths.items() if length >= self.max_length)
        if full:
            raise ValueError(f"full rows: {full}. Release them: a row holds {self.max_length} tokens, its max_length")
        if tokens.device.type == "cpu":  # a check on another device would wait for it
            _, vocabulary = arguments.vocabulary_sizes(self._model.config)
            arguments.check_ids("tokens", tokens[None, list(lengths)], vocabulary)
        with self._model.call():
            return self._cache.step(tokens.to(self._model.device, torch.int64))

    def release(self, row: int) -> None:
        """End a row's sequence and free the row.

        Raises:
            ValueError: The row isn't claimed.
            RuntimeError: The rows or the model are closed.
        """
        self._check(row)
        with self._model.call():
            self._cache.clear(row)
        self._free.append(row)

    def close(self) -> None:
        """Give the caches back to the model. Further calls raise `RuntimeError`."""
        if not self._closed:
            self._closed = True
            self._cache.close()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        """Raise `RuntimeError` if the rows are closed."""
        if self._closed:
            raise RuntimeError("these rows are closed: open others with model.rows")

    def _check(self, row: int) -> None:
        """Raise `ValueError` if a row isn't claimed."""
        self._check_open()
        if not 0 <= row < self.capacity or row in self._free:
            claimed = sorted(set(range(self.capacity)) - set(self._free))
            raise ValueError(f"row {row} is not claimed: claimed are {claimed}")


def open_rows(model: "AcceleratedModel", capacity: int, max_length: int, source_length: int) -> Rows:
    """Open rows; arguments, result and errors as of `AcceleratedModel.rows`."""
    for name, value in (("capacity", capacity), ("max_length", max_length), ("source_length", source_length)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    runtime = model.runtime
    if not isinstance(runtime, StaticCacheRuntime):
        raise AccelError(
            "rows need static caches, and this model has dynamic ones. Build it with convert.static_decode=true and "
            'open it with accel.load(folder, static=True), or runtime="cuda-graph"'
        )
    if angles_depend_on_length(model.config):
        raise AccelError(
            f"rows of different lengths can't share a batch of this {model.config.model_type} model: its rotary "
            "embeddings depend on the length of the whole input"
        )
    with model.call():
        return Rows(model, runtime, runtime.open_rows(capacity, max_length, source_length), capacity)
