"""Transformers caches whose keys and values are those of a runtime's state.

A layer of such a cache reads the state when it is asked, so nothing is copied. A cache that the caller passed to
`forward` is filled in place, as transformers' models fill it: its layers become layers over the state.
"""

from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from accel.runtime.protocol import State


class StateLayer(DynamicLayer):
    """One layer of keys and values [batch, heads, length, head_size] in a runtime's state.

    All layers of a cache belong to one state, so one of them, the leader, carries out what is done to every layer.
    Assigning keys or values, as transformers' own models do when they are given the cache, detaches the layer: it holds
    tensors of its own from then on.

    Args:
        state: Caches of one generation.
        names: Names of its keys and values in `state.views()`.
        view: Its keys now. Their views are costly for many layers, so they are made once for all.
        is_cross: True for keys and values of the encoder's output, of which there is one per source token.
        is_leader: True for the layer that carries out changes of the whole state.
    """

    def __init__(self, state: State, names: tuple[str, str], view: Tensor, is_cross: bool, is_leader: bool) -> None:
        self._state: State | None = state
        self._names = names
        self._own: list[Tensor | None] = [None, None]
        self._cross_length = view.shape[-2] if is_cross else None
        self._is_leader = is_leader
        self.is_initialized = True
        self.max_length = -1  # of the static layer whose place this one takes; -1: no maximum
        self.dtype, self.device = view.dtype, view.device

    @property
    def state(self) -> State | None:
        """State that the layer reads; None once it is detached."""
        return self._state

    @property
    def keys(self) -> Tensor | None:
        """Keys, valid until the next call of the model."""
        return self._get(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._set(0, tensor)

    @property
    def values(self) -> Tensor | None:
        """Values, valid until the next call of the model."""
        return self._get(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._set(1, tensor)

    def _get(self, index: int) -> Tensor | None:
        """Return keys (0) or values (1)."""
        return self._own[index] if self._state is None else self._state.views()[self._names[index]]

    def _set(self, index: int, tensor: Tensor | None) -> None:
        """Detach from the state, and replace keys (0) or values (1)."""
        if self._state is not None:
            views = self._state.views()
            self._own = [views[name].clone() for name in self._names]
            self._state = None
        self._own[index] = tensor

    def get_max_length(self) -> int:
        """Return how many tokens the layer may hold, -1 for any number."""
        return self.max_length

    def get_seq_length(self) -> int:
        """Return the number of tokens that have keys and values in this layer."""
        if self._state is None:
            return super().get_seq_length()
        return self._state.length if self._cross_length is None else self._cross_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i continue from what was sequence `beam_idx[i]`; beam_idx: [batch]."""
        if self._state is None:
            super().reorder_cache(cast(Any, beam_idx))
        elif self._is_leader:
            self._state.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, or keep so many of the first where it is positive."""
        if self._state is None:
            super().crop(tokens_to_remove)
        elif self._is_leader:
            length = self._state.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
            self._state.crop(min(length, self._state.length))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies next to each other."""
        if self._state is None:
            super().batch_repeat_interleave(repeats)
        elif self._is_leader:
            self._state.expand(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`: [new batch]."""
        if self._state is None:
            super().batch_select_indices(indices)
        elif self._is_leader:
            self._state.select(indices)


def cache_over(state: State, is_encoder_decoder: bool) -> Cache:
    """Return a `DynamicCache` over a state, or an `EncoderDecoderCache` of two."""
    own, cross = _layers(state, is_encoder_decoder)
    cache = DynamicCache()
    cache.layers = own
    if not is_encoder_decoder:
        return cache
    cross_cache = DynamicCache()
    cross_cache.layers = cross
    return EncoderDecoderCache(cache, cross_cache)


def fill(cache: Cache, state: State, is_encoder_decoder: bool) -> None:
    """Let a cache that the caller holds read the state from now on.

    Args:
        cache: Any transformers cache of keys and values; what it held before is dropped.
        state: State that takes its place.
        is_encoder_decoder: True if the second half of the state's caches are cross-attention caches.
    """
    own, cross = _layers(state, is_encoder_decoder)
    if isinstance(cache, EncoderDecoderCache):
        _replace_layers(cache.self_attention_cache, own)
        _replace_layers(cache.cross_attention_cache, cross)
        cache.is_updated = dict.fromkeys(range(len(cross)), True)
    else:
        _replace_layers(cache, own)


def _replace_layers(cache: Cache, layers: list[Any]) -> None:
    """Replace the layers of a cache by `layers`; a static cache stays one that transformers compiles calls for."""
    compileable = cache.is_compileable
    max_length = cache.get_max_length() if cache.layers else -1
    for layer in layers:
        layer.is_compileable = compileable
        layer.max_length = max_length
    cache.layers[:] = layers


def state_of(cache: Any) -> State | None:
    """Return the state that all layers of a cache read; None for a cache of tensors, or for no cache."""
    layers: list[Any] = _self_attention(cache).layers if isinstance(cache, Cache) else []
    if not layers or not isinstance(layers[0], StateLayer):
        return None
    state = layers[0].state
    attached = all(isinstance(layer, StateLayer) and layer.state is state for layer in layers)
    return state if attached else None


def tensors_of(cache: Cache) -> list[Tensor]:
    """Return keys and values of a cache of tensors, layer by layer, self-attention caches first.

    Raises:
        ValueError: A layer lacks tokens, as with sliding windows: the graph needs the keys and values of all.
    """
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    )
    tensors: list[Tensor] = []
    for part in parts:
        layers: list[Any] = part.layers
        lengths = {int(part.get_seq_length(index)) for index in range(len(part.layers))}
        length = max(lengths)
        for layer in layers:
            if len(lengths) > 1 or layer.keys.shape[2] < length:
                held = sorted({each.keys.shape[2] for each in layers})
                raise ValueError(
                    f"past_key_values: the layers of this {type(cache).__name__} hold {held} of {length} tokens: "
                    "pass a cache whose layers hold every token, such as DynamicCache() without a config"
                )
            # a static cache is longer than what it holds
            tensors += [layer.keys[:, :, :length], layer.values[:, :, :length]]
    return tensors


def _self_attention(cache: Cache) -> Cache:
    """Return the part of a cache that grows with every token."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _layers(state: State, is_encoder_decoder: bool) -> tuple[list[Any], list[Any]]:
    """Return the layers of self-attention and of cross-attention."""
    views = state.views()
    names = list(views)
    pairs = list(zip(names[::2], names[1::2], strict=True))
    own = len(pairs) // 2 if is_encoder_decoder else len(pairs)
    layers: list[Any] = [
        StateLayer(state, pair, views[pair[0]], is_cross=index >= own, is_leader=index == 0)
        for index, pair in enumerate(pairs)
    ]
    return layers[:own], layers[own:]


def is_empty(cache: Any) -> bool:
    """Return whether there is no cache, or one without tokens."""
    return cache is None or _self_attention(cache).get_seq_length() == 0
