"""Caches with spare room are extended in place, and hold what PyTorch's caches hold after every operation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accel import testing
from accel.runtime.cache_buffers import SPARE_TOKENS
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from tests.families import FAMILIES

PROMPT = 7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    folder = shared / "families" / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    with testing.prepare(FAMILIES["llama"], folder, artifacts=artifacts) as subject:
        yield subject


class Both:
    """A decoder in PyTorch and in the runtime, after a prompt whose second row is padded."""

    def __init__(self, subject: testing.Subject, rows: int = 2) -> None:
        self.eager: Any = subject.eager
        self.runtime: Any = subject.model.runtime
        self.ids, self.mask = subject.ids(rows, PROMPT), torch.ones(rows, PROMPT, dtype=torch.int64)
        self.mask[1:, :2] = 0
        self.cache = DynamicCache()
        expected = self._pytorch(self.ids)
        logits, self.state = self.runtime.prefill(decoder_inputs(self.ids, self.mask))
        self._assert_close(logits, expected)

    def _pytorch(self, ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            output = self.eager(
                input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
            )
        return output.logits

    def _assert_close(self, actual: Tensor, expected: Tensor) -> None:
        shown = self.mask[:, -actual.shape[1] :].bool()
        torch.testing.assert_close(actual[shown], expected[shown], rtol=1e-4, atol=1e-4)

    def decode(self, new: int = 1) -> None:
        """Decode tokens and compare logits and caches."""
        rows = len(self.mask)
        ids = 3 + (torch.arange(rows * new).view(rows, new) * 7 + self.state.length) % 90
        self.mask = torch.cat([self.mask, self.mask.new_ones(rows, new)], dim=1)
        self._assert_close(self.runtime.decode(decoder_inputs(ids, self.mask), self.state), self._pytorch(ids))
        self.assert_same_caches()

    def assert_same_caches(self) -> None:
        assert self.state.length == self.cache.get_seq_length()
        views = list(self.state.views().values())
        expected = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        for view, tensor in zip(views, expected, strict=True):
            assert view.shape == tensor.shape
            shown = self.mask[:, None, : tensor.shape[2], None].bool().expand_as(tensor)
            torch.testing.assert_close(view[shown], tensor[shown], rtol=1e-4, atol=1e-4)


def test_many_prompts_are_computed_one_by_one(llama: testing.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that their scores take no more memory than those of a few long prompts; caches and tokens stay the same."""
    runtime: Any = llama.model.runtime
    at_once, widths = runtime.prefill_at_once, []
    monkeypatch.setattr(
        runtime, "prefill_at_once", lambda inputs: widths.append(inputs["input_ids"].shape) or at_once(inputs)
    )
    monkeypatch.setattr(runtime, "prefill_chunk", PROMPT)
    for rows, expected in ((16, [(16, PROMPT)]), (17, [(1, PROMPT)] * 17)):
        widths.clear()
        both = Both(llama, rows)
        both.assert_same_caches()
        both.decode()
        assert widths == expected


@pytest.mark.parametrize("rows", [1, 2])
def test_long_continuations_are_cut(llama: testing.Subject, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Many tokens behind cached ones are decoded in chunks; logits and caches stay PyTorch's."""
    runtime: Any = llama.model.runtime
    at_once, widths = runtime.decode_at_once, []
    monkeypatch.setattr(
        runtime,
        "decode_at_once",
        lambda inputs, state: widths.append(inputs["input_ids"].shape) or at_once(inputs, state),
    )
    monkeypatch.setattr(runtime, "prefill_chunk", PROMPT)
    both = Both(llama, rows)
    both.decode(2 * PROMPT + 3)
    assert widths == [(1, PROMPT), (1, PROMPT), (1, 3)] * rows
    both.decode()


def test_extended_in_place(llama: testing.Subject) -> None:
    """Within the spare room caches keep their address and their earlier entries; then they move to longer buffers."""
    both = Both(llama)
    assert isinstance(both.runtime, DynamicCacheRuntime)
    assert both.runtime.in_place
    both.decode()
    held = next(iter(both.state.views().values()))
    before = held.clone()
    for _ in range(3):
        both.decode()
        grown = next(iter(both.state.views().values()))
        assert grown.data_ptr() == held.data_ptr()
        assert torch.equal(grown[:, :, : before.shape[2]], before)
    for _ in range(SPARE_TOKENS):
        both.decode()
    assert next(iter(both.state.views().values())).data_ptr() != held.data_ptr()


def test_several_tokens_crop_and_reorder(llama: testing.Subject) -> None:
    """As in assisted decoding and beam search."""
    both = Both(llama)
    both.decode(4)
    both.decode()
    both.state.crop(PROMPT + 2)
    both.cache.crop(-3)
    both.mask = both.mask[:, : PROMPT + 2]
    both.decode(3)
    both.decode()
    for index in ([1, 0], [1, 1], [0, 1]):
        both.state.reorder(torch.tensor(index))
        both.cache.reorder_cache(torch.tensor(index))
        both.mask = both.mask[index]
        both.decode()
    both.state.expand(2)
    both.cache.batch_repeat_interleave(2)
    both.mask = both.mask.repeat_interleave(2, 0)
    both.decode()
    both.decode()


def test_a_copy_has_buffers_of_its_own(llama: testing.Subject) -> None:
    """Neither state writes into the other's caches."""
    both = Both(llama)
    both.decode()
    copy: DynamicCacheState = both.state.copy()
    mask = torch.cat([both.mask, both.mask.new_ones(2, 1)], dim=1)
    both.runtime.decode(decoder_inputs(torch.full((2, 1), 50), mask), copy)
    both.assert_same_caches()
    both.decode()
    both.decode()
