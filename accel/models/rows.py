"""A running batch whose rows are sequences of their own: a row is claimed, prefilled, stepped and released."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.models import arguments
from accel.models.prompt_cache import PromptCache
from accel.models.rope import angles_depend_on_length
from accel.models.row_prefill import RowPrefill
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.layout import IDS, MASK
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
        source_length: Beside an encoder, the longest input of a row, in tokens.

    Attributes:
        model: The model.
        runtime: Its runtime.
        cache: The rows' caches.
        capacity: Number of rows.
        max_length: Largest number of tokens in a row, its prompt counted: at least what was asked for.
        source_length: Beside an encoder, the longest input of a row, in tokens.
    """

    def __init__(
        self,
        model: "AcceleratedModel",
        runtime: StaticCacheRuntime,
        cache: CacheRows,
        capacity: int,
        source_length: int,
    ) -> None:
        self.model, self.runtime = model, runtime
        self._claimed: set[int] = set()
        self._prefills: dict[int, RowPrefill] = {}
        _, self._vocabulary = arguments.vocabulary_sizes(model.config)  # which takes as long as a step of a small model
        self._closed = False
        self._use(cache, capacity, source_length)

    def _use(self, cache: CacheRows, capacity: int, source_length: int) -> None:
        """Go on over these caches."""
        self.cache, self.capacity, self.max_length, self.source_length = cache, capacity, cache.bucket, source_length

    @property
    def free(self) -> int:
        """Number of rows that can be claimed."""
        return self.capacity - len(self._claimed)

    def length(self, row: int) -> int:
        """Return the number of tokens in a row, 0 before its prefill.

        Raises:
            ValueError: The row isn't claimed.
        """
        self.check_claimed(row)
        return self.cache.lengths.get(row, 0)

    def claim(self) -> int:
        """Reserve a row and return its number.

        Raises:
            AccelError: All rows are claimed.
            RuntimeError: The rows are closed.
        """
        self._check_open()
        if not self.free:
            raise AccelError(f"no row is free: all {self.capacity} are claimed. Release one, or open more")
        row = next(row for row in range(self.capacity) if row not in self._claimed)
        self._claimed.add(row)
        return row

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
        logits = self.begin(row, **inputs).advance()
        if logits is None:  # never: all tokens are computed
            raise RuntimeError(f"the prefill of row {row} is not complete")
        return logits

    def begin(self, row: int, **inputs: Any) -> RowPrefill:
        """Begin a sequence in a row, whose prompt is then computed in parts by `RowPrefill.advance`.

        Other rows can be prefilled and stepped between two parts. An encoder runs at once, here.

        Args:
            row: A claimed row.
            inputs: As for `prefill`.

        Raises:
            As `prefill`.
        """
        self.check_claimed(row)
        prompt_cache = inputs.pop("past_key_values", None)
        with self.model.call():
            first_inputs = self.model.prefill_inputs(**inputs)
            if len(first_inputs["input_ids"]) != 1:
                raise ValueError(f"{len(first_inputs['input_ids'])} sequences were given: a row takes one")
            self._check_length(first_inputs)
            prefill = RowPrefill(self, row, first_inputs, self._shared_state(prompt_cache, first_inputs))
        self._prefills[row] = prefill
        return prefill

    def prefill_together(self, rows: Sequence[int], **inputs: Any) -> Tensor:
        """Begin sequences in several rows at once, which takes less time than one by one where they are short.

        Args:
            rows: Claimed rows.
            inputs: One input for each row, as for `prefill`, in a batch: shorter ones are padded, and `attention_mask`
                [rows, length] is 0 there. Padding of a decoder-only model's prompts is on the left, and takes no room.

        Returns:
            Logits of the first new tokens, [rows, vocabulary].

        Raises:
            As `prefill`, and ValueError if there aren't as many inputs as rows.
        """
        for row in rows:
            self.check_claimed(row)
        with self.model.call():
            first_inputs = self.model.prefill_inputs(**inputs)
            if len(first_inputs[IDS]) != len(rows):
                raise ValueError(f"{len(first_inputs[IDS])} sequences were given for {len(rows)} rows")
            self._check_length(first_inputs)
            padding = left_padding(first_inputs[MASK]) if MASK in first_inputs else None
            logits, state = self.runtime.dynamic.prefill(first_inputs)
            self.cache.fill(rows, state, first_inputs, padding)
        return logits[:, -1]

    @property
    def can_begin_together(self) -> bool:
        """True if `begin_together` can be called: beside an encoder, but for folders of earlier versions of accel."""
        return self.runtime.starts_static and bool(self.runtime.cross_caches)

    def begin_together(self, rows: Sequence[int], **inputs: Any) -> None:
        """Begin sequences whose decoder prompt is one token, which the next step decodes with the other rows' tokens.

        That takes fewer launches than `prefill_together`: the encoder and one graph for what the decoder reads of it.
        That graph computes all rows.

        Args:
            rows: Claimed rows, of length 0 afterwards.
            inputs: One input of the encoder for each row, as for `prefill_together`, or `encoder_outputs`.

        Raises:
            As `prefill_together`, and AccelError if there is no such graph.
        """
        for row in rows:
            self.check_claimed(row)
        if not self.can_begin_together:
            raise AccelError("no graph computes the cross-attention caches of this model: call prefill_together")
        with self.model.call():
            first_inputs = self.model.prefill_inputs(**inputs)
            if len(first_inputs[IDS]) != len(rows):
                raise ValueError(f"{len(first_inputs[IDS])} sequences were given for {len(rows)} rows")
            self.cache.begin(rows, first_inputs)

    def _check_length(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` if a prompt is empty or longer than a row."""
        length = inputs["input_ids"].shape[1]
        if not 0 < length <= self.max_length:
            raise ValueError(f"the prompt has {length} tokens, a row holds 1 to {self.max_length}: max_length")

    def _shared_state(self, cache: Any, inputs: Mapping[str, Tensor]) -> DynamicCacheState | None:
        """Return a state of the tokens that a prompt shares with a prompt cache; None without one."""
        if cache is None:
            return None
        if not isinstance(cache, PromptCache) or self.model.config.is_encoder_decoder:
            raise ValueError(
                f"past_key_values of type {type(cache).__name__}: a row begins without, or with a PromptCache made by "
                "model.cache_prompt, which decoder-only models have"
            )
        shared: Any = cache.prefix_of(inputs["input_ids"], inputs["attention_mask"]).copy(1)
        state: DynamicCacheState = shared.make_dynamic()
        return state

    def resize(self, capacity: int, max_length: int, source_length: int | None = None) -> dict[int, int]:
        """Move to another number or length of rows. A decode step takes the time of all rows at their full length.

        Args:
            capacity: Number of rows, at least those that are claimed.
            max_length: As for `AcceleratedModel.rows`; no prefilled row may be longer.
            source_length: Likewise; by default as before.

        Returns:
            Claimed row before -> the same row now. Prefills that have begun go on there.

        Raises:
            AccelError: The model has fewer positions, or `capacity` isn't one of the runtime's `capture_batch_sizes`.
            DeviceMemoryError: The device has too little memory beside the present rows. They are as before.
            ValueError: The claimed rows don't fit, or a number is less than 1.
            RuntimeError: The rows or the model are closed.
        """
        self._check_open()
        source_length = self.source_length if source_length is None else source_length
        check_sizes(capacity=capacity, max_length=max_length, source_length=source_length)
        longest = max(self.cache.lengths.values(), default=0)
        longest_source = max(self.cache.source_lengths.values(), default=0)
        if capacity < len(self._claimed) or max_length < longest or source_length < longest_source:
            raise ValueError(
                f"{capacity} rows of {max_length} tokens with inputs of {source_length} can't hold the "
                f"{len(self._claimed)} claimed rows of up to {longest} tokens with inputs of up to {longest_source}"
            )
        with self.model.call():
            cache = self.runtime.open_rows(capacity, max_length, source_length)
            moved = {old: new for new, old in enumerate(sorted(self._claimed))}
            cache.take_over(self.cache, {old: moved[old] for old in self.cache.lengths})
            self.cache.close()
        self._claimed = set(moved.values())
        self._prefills = {moved[row]: prefill for row, prefill in self._prefills.items()}
        for row, prefill in self._prefills.items():
            prefill.row = row
        self._use(cache, capacity, source_length)
        return moved

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
        lengths = self.cache.lengths
        tokens = torch.as_tensor(tokens)
        if tuple(tokens.shape) != (self.capacity,):
            raise ValueError(f"tokens has shape {list(tokens.shape)}, expected [{self.capacity}], one for each row")
        if not lengths:
            raise ValueError("no row is prefilled")
        full = sorted(row for row, length in lengths.items() if length >= self.max_length)
        if full:
            raise ValueError(f"full rows: {full}. Release them: a row holds {self.max_length} tokens, its max_length")
        if tokens.device.type == "cpu":  # a check on another device would wait for it
            arguments.check_ids("tokens", tokens[None, list(lengths)], self._vocabulary)
        with self.model.call():
            return self.cache.step(tokens.to(self.model.device, torch.int64, non_blocking=True))

    def release(self, *rows: int) -> None:
        """End the sequences of rows and free these.

        Raises:
            ValueError: A row isn't claimed.
            RuntimeError: The rows or the model are closed.
        """
        for row in rows:
            self.check_claimed(row)
        with self.model.call():
            self.cache.clear(rows)
        self._claimed.difference_update(rows)
        for row in rows:
            self._prefills.pop(row, None)

    def close(self) -> None:
        """Give the caches back to the model. Further calls raise `RuntimeError`."""
        if not self._closed:
            self._closed = True
            self.cache.close()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        """Raise `RuntimeError` if the rows are closed."""
        if self._closed:
            raise RuntimeError("these rows are closed: open others with model.rows")

    def check_claimed(self, row: int) -> None:
        """Raise `ValueError` if a row isn't claimed, `RuntimeError` if the rows are closed."""
        self._check_open()
        if row not in self._claimed:
            raise ValueError(f"row {row} is not claimed: claimed are {sorted(self._claimed)}")


def left_padding(mask: Tensor) -> list[int] | None:
    """Return the number of zeros that each row of a mask [rows, length] begins with; None if no row does."""
    padding: list[int] = (mask.cumsum(1) == 0).sum(1).clamp(max=mask.shape[1] - 1).tolist()
    return padding if any(padding) else None


def check_sizes(**sizes: int) -> None:
    """Raise `ValueError` if one of these numbers is less than 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")


def open_rows(model: "AcceleratedModel", capacity: int, max_length: int, source_length: int) -> Rows:
    """Open rows; arguments, result and errors as of `AcceleratedModel.rows`."""
    check_sizes(capacity=capacity, max_length=max_length, source_length=source_length)
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
        cache = runtime.open_rows(capacity, max_length, source_length)
        return Rows(model, runtime, cache, capacity, source_length)
