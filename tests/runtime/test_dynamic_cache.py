"""Dynamic caches: same contents as PyTorch's caches after every operation, and no copies to the host."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.runtime.dlpack import OrtValueHandle, Value
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.io_binding import BoundSession

BATCH, SOURCE, PAST = 3, 9, 5


@pytest.fixture(scope="module")
def model(deployable: Path) -> Iterator[AcceleratedModel]:
    with load(deployable, runtime="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def eager(tiny: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(tiny).eval()


class Both:
    """One decoder in PyTorch with transformers' cache and in a runtime with its state, after the same prefill."""

    def __init__(self, model: AcceleratedModel, eager: T5ForConditionalGeneration, past: int = PAST) -> None:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 120, (BATCH, SOURCE), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        self.model, self.eager, self.mask = model, eager, mask
        with torch.no_grad():
            self.hidden = eager.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        encoded = model.runtime.encode({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        torch.testing.assert_close(encoded, self.hidden, rtol=1e-4, atol=1e-5)
        start = torch.randint(3, 120, (BATCH, past), generator=generator)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        expected = self.pytorch(start)
        logits, self.state = model.runtime.prefill(
            {"input_ids": start, "encoder_hidden_states": encoded, "encoder_attention_mask": mask}
        )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def pytorch(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.eager(
                decoder_input_ids=ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=self.hidden),
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache = output.past_key_values
        return output.logits

    def assert_same(self) -> None:
        """Compare every cache, and the logits of two more calls, one of them with several new ids."""
        self.assert_same_caches()
        for new in (1, 3):
            ids = torch.arange(3, 3 + self.state.batch * new).view(-1, new)
            torch.testing.assert_close(
                self.model.runtime.decode({"input_ids": ids}, self.state), self.pytorch(ids), rtol=1e-4, atol=1e-4
            )
        self.assert_same_caches()

    def expand_then_reorder(self) -> None:
        """Expand and reorder as beam search does, and compare after each."""
        self.state.expand(2)
        self.cache.batch_repeat_interleave(2)
        self.hidden, self.mask = self.hidden.repeat_interleave(2, 0), self.mask.repeat_interleave(2, 0)
        self.assert_same()
        index = torch.tensor([1, 0, 2, 2, 5, 4])
        self.state.reorder(index)
        self.cache.reorder_cache(index)
        self.assert_same()

    def assert_same_caches(self) -> None:
        views = self.state.views()
        own, cross = self.cache.self_attention_cache.layers, self.cache.cross_attention_cache.layers
        assert len(views) == 4 * 2
        assert self.state.length == self.cache.get_seq_length()
        assert self.state.batch == own[0].keys.shape[0]
        for layer in range(2):
            for part, known in (("decoder", own[layer]), ("encoder", cross[layer])):
                for kind, tensor in (("key", known.keys), ("value", known.values)):
                    found = views[f"past_key_values.{layer}.{part}.{kind}"]
                    torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture
def both(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> Both:
    return Both(model, eager)


def test_views_and_decode_steps(both: Both) -> None:
    """Caches equal PyTorch's, [batch, heads, length, head_size]."""
    both.assert_same()
    assert both.state.views()["past_key_values.0.decoder.key"].shape == (BATCH, 4, PAST + 4, 16)


def test_crop(both: Both) -> None:
    """Decoding continues after the last tokens are dropped."""
    both.state.crop(2)
    both.cache.crop(2 - PAST)  # transformers takes the negative number of tokens to drop
    assert both.state.length == 2
    both.assert_same()


def test_expand_then_reorder(both: Both) -> None:
    """Sequences are repeated, decoded, then reordered within each input."""
    both.expand_then_reorder()


def test_reorder_moves_the_right_rows(both: Both) -> None:
    """Every self-attention cache follows the index, and its rows differ."""
    both.state.expand(2)
    both.model.runtime.decode({"input_ids": torch.arange(10, 16)[:, None]}, both.state)
    before = {name: view.clone() for name, view in both.state.views().items()}
    index = torch.tensor([1, 1, 3, 2, 4, 4])
    both.state.reorder(index)
    for name, view in both.state.views().items():
        assert torch.equal(view, before[name][index])
        if ".decoder." in name:
            assert not torch.equal(view, before[name])


def test_select(both: Both) -> None:
    """Selected sequences continue, with their masks and cross-attention caches."""
    index = torch.tensor([2, 1])
    both.state.select(index)
    both.cache.batch_select_indices(index)
    both.hidden, both.mask = both.hidden[index], both.mask[index]
    assert both.state.batch == 2
    both.assert_same()


def test_states_are_independent(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Two generations at once over one runtime don't change each other's caches."""
    first, second = Both(model, eager), Both(model, eager)
    second.state.select(torch.tensor([0]))
    model.runtime.decode({"input_ids": torch.tensor([[4]])}, second.state)
    first.assert_same()


def test_prefill_takes_no_past(both: Both, model: AcceleratedModel) -> None:
    """A prefill after other generations starts with empty caches, for any batch size."""
    one = {"input_ids": torch.tensor([[5]]), "encoder_hidden_states": both.hidden[:1]}
    one["encoder_attention_mask"] = both.mask[:1]
    _, state = model.runtime.prefill(one)
    assert (state.length, state.batch) == (1, 1)


# calls within one `generate`


def inputs() -> dict[str, Any]:
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "no_repeat_ngram_size": 1}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_encoder_runs_once(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """The encoder runs once per `generate`, on the inputs as given, not once per beam or token."""
    calls: list[int] = []
    real = model.runtime.encode

    def encode(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        calls.append(inputs["input_ids"].shape[0])
        return real(inputs)

    monkeypatch.setattr(model.runtime, "encode", encode)
    model.generate(**inputs(), **options)
    assert calls == [2]


def test_prefill_once_then_one_token_per_decode_step(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is used: one prefill, then every decode step takes one new id and a past that is one longer."""
    steps: list[tuple[int, int]] = []
    prefills: list[int] = []
    decode, prefill = model.runtime.decode, model.runtime.prefill

    def count(inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        steps.append((inputs["input_ids"].shape[1], state.length))
        return decode(inputs, state)

    monkeypatch.setattr(model.runtime, "decode", count)
    monkeypatch.setattr(model.runtime, "prefill", lambda inputs: prefills.append(1) or prefill(inputs))
    model.generate(**inputs(), min_new_tokens=12)
    assert prefills == [1]
    assert steps == [(1, length) for length in range(1, 12)]


def test_caches_are_never_converted_to_numpy(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is converted to NumPy arrays during a generation."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("copied to NumPy")

    expected = model.generate(**inputs(), num_beams=3)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", refuse)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", refuse)
    monkeypatch.setattr(onnxruntime.IOBinding, "copy_outputs_to_cpu", refuse)
    assert torch.equal(model.generate(**inputs(), num_beams=3), expected)


def test_caches_are_not_copied(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy: the past of a decode step has the address of the present of the step before it."""
    runs: list[tuple[dict[str, int], dict[str, int]]] = []
    real = BoundSession.run

    def address(value: Value) -> int:
        return int(value.value.data_ptr() if isinstance(value, OrtValueHandle) else value.data_ptr())

    def run(self: BoundSession, inputs: Mapping[str, Value], output_names: list[str], handles: int = 0) -> list[Value]:
        outputs = real(self, inputs, output_names, handles)
        read = {name: address(value) for name, value in inputs.items()}
        runs.append((read, dict(zip(output_names, map(address, outputs), strict=True))))
        return outputs

    monkeypatch.setattr(BoundSession, "run", run)
    model.generate(**inputs(), min_new_tokens=12)
    decoder = runs[1:]
    assert len(decoder) == 12
    for (_, written), (read, _) in pairwise(decoder):
        for layer in range(2):
            for kind in ("key", "value"):
                present, past = f"present.{layer}.decoder.{kind}", f"past_key_values.{layer}.decoder.{kind}"
                assert read[past] == written[present]
    cross = [read["past_key_values.0.encoder.key"] for read, _ in decoder[1:]]
    assert set(cross) == {decoder[0][1]["present.0.encoder.key"]}
