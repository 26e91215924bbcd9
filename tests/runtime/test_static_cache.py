"""Caches of a fixed length: what a State does to them is what PyTorch's caches do, and they stay where they are."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import T5ForConditionalGeneration

from accel.benchmark.timer import fixed_length_options, time_generation
from accel.config.presets import runtime_preset
from accel.errors import AccelError
from accel.models.generation import AcceleratedModel
from accel.models.loading import open_model
from accel.runtime import dynamic_cache as onnx_runtime
from accel.runtime import static_cache
from accel.runtime.decode_buffers import DecodeGraphs
from accel.runtime.dynamic_cache import open_dynamic
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import CROSS_CACHE, DECODER, STATIC_DECODE
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.static_cache import SPARE, StaticCacheRuntime
from accel.runtime.weights import SharedWeights
from tests.conftest import Build
from tests.runtime.test_dynamic_cache import BATCH, PAST, Both

STATIC = runtime_preset("cpu", static=True, buckets=[8, 12, 32])


FUSED = (  # as on a GPU
    "convert.fuse_attention=[encoder,static_decode]",
    "convert.fuse_transposed_matmul=true",
    "merge.strategy=three_branch",
)


@pytest.fixture(scope="module", params=[(), FUSED], ids=["plain", "fused"])
def folder(request: pytest.FixtureRequest, build: Build, tiny: Path) -> Path:
    return build(tiny, "verify", ("runtime.static=true", *request.param))[1]["verify"].folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[AcceleratedModel]:
    with open_model(folder, STATIC) as opened:
        yield opened


@pytest.fixture
def both(model: AcceleratedModel, tiny: Path) -> Both:
    return Both(model, T5ForConditionalGeneration.from_pretrained(tiny).eval())


def decode(both: Both, new: int = 1) -> None:
    ids = torch.arange(3, 3 + both.state.batch * new).view(-1, new) + both.state.length
    found = both.model.runtime.decode({"input_ids": ids}, both.state)
    torch.testing.assert_close(found, both.pytorch(ids), rtol=1e-4, atol=1e-4)


def test_caches_after_twenty_steps(both: Both) -> None:
    """From bucket to bucket, one source of the batch padded; every step's logits and then every cache is PyTorch's."""
    seen = [both.state.buffers.bucket]
    for _ in range(20):
        decode(both)
        seen.append(both.state.buffers.bucket)
    assert both.state.length == PAST + 20
    assert sorted(set(seen)) == [8, 12, 32]
    both.assert_same_caches()


def test_written_in_place(both: Both) -> None:
    """Within a bucket nothing moves: keys are read where the last step wrote them, and only one place changes."""
    held = both.state.buffers.self_caches["past_key_values.1.decoder.value"]
    held[:, :, PAST] = 0  # another generation may have been here
    before, address = held.clone(), held.data_ptr()
    decode(both)
    assert both.state.buffers.self_caches["past_key_values.1.decoder.value"].data_ptr() == address
    changed = (held != before).any(dim=(0, 1, 3))
    assert changed.nonzero().flatten().tolist() == [PAST]


def test_logits_stay(both: Both) -> None:
    """What a step returned is not what the next one overwrites."""
    ids = torch.full((BATCH, 1), 7)
    first = both.model.runtime.decode({"input_ids": ids}, both.state)
    kept = first.clone()
    both.model.runtime.decode({"input_ids": ids + 1}, both.state)
    assert torch.equal(first, kept)


def test_several_tokens_and_crop(both: Both) -> None:
    """As assisted decoding does: several at once, some of them forgotten, across a bucket's end."""
    decode(both, 4)
    both.state.crop(PAST + 1)
    both.cache.crop(-3)
    both.assert_same()
    assert both.state.buffers.bucket == 12


def test_beams(both: Both) -> None:
    """Every sequence twice, and then each continues from what another of its input was."""
    both.expand_then_reorder()


def test_what_another_generation_left(both: Both, model: AcceleratedModel) -> None:
    """A slot is used again, and what was computed in it, be it NaN, is gone."""
    buffers = both.state.buffers
    for cache in buffers.self_caches.values():
        cache.fill_(torch.nan)
    del both.state
    again = Both(model, both.eager)
    assert again.state.buffers is buffers
    again.assert_same()


def test_the_first_token_is_a_step(both: Both, model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged decoder isn't called for it, and all caches are PyTorch's, though another generation was there."""
    buffers = both.state.buffers
    for room in (*buffers.self_caches.values(), *buffers.constants.values()):
        room.fill_(torch.nan if room.is_floating_point() else 1)
    del both.state
    monkeypatch.setattr(model.runtime.dynamic, "prefill", pytest.fail)
    first = Both(model, both.eager, past=1)
    assert first.state.buffers is buffers
    for _ in range(9):
        decode(first)
    monkeypatch.undo()
    first.assert_same()
    first.expand_then_reorder()


def test_one_latency_a_token(model: AcceleratedModel) -> None:
    """The clock sees one call a token, the first one's too."""
    timing = time_generation(
        model, {"input_ids": torch.tensor([[5, 9, 7]])}, fixed_length_options(5, 1, use_cache=True)
    )
    assert len(timing.latencies) == 5


def test_the_first_token_without_its_graph(folder: Path, tiny: Path, tmp_path: Path) -> None:
    """A folder that doesn't hold what makes the caches of the encoder's output begins with the merged decoder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / CROSS_CACHE).unlink()
    with open_model(tmp_path, STATIC) as opened:
        Both(opened, T5ForConditionalGeneration.from_pretrained(tiny).eval(), past=1).assert_same()


def test_two_generations_at_once(both: Both, model: AcceleratedModel, tiny: Path) -> None:
    """Each has caches of its own."""
    other = Both(model, both.eager)
    decode(both, 1)
    other.assert_same()
    both.assert_same()


def test_longer_than_the_largest_bucket(both: Both) -> None:
    """One message with the length and what to do; the tokens before it are still there."""
    for _ in range(32 - PAST):
        decode(both)
    with pytest.raises(AccelError, match=r"no room for 33 tokens.*runtime.buckets=\[8, 12, 32\].*runtime.static=false"):
        decode(both)
    both.assert_same_caches()


def test_other_batches_than_those_captured(folder: Path) -> None:
    """Told before anything is decoded, with the batches there are; those are ready from the start."""
    only = replace(STATIC, batches=[2, 6], buckets=[8, 16])
    ids = torch.arange(3, 9).view(3, 2)
    with open_model(folder, only) as opened:
        assert [(buffers.batch, buffers.bucket) for _, buffers in opened.runtime._spare] == [
            (2, 8),
            (2, 16),
            (6, 8),
            (6, 16),
        ]
        with pytest.raises(AccelError, match=r"3 sequences at once.*runtime.capture_batch_sizes=\[2, 6\]"):
            opened.generate(ids, max_new_tokens=3)
        assert opened.generate(ids[:2], max_new_tokens=3).shape == (2, 4)
        assert opened.generate(ids, num_beams=2, max_new_tokens=3).shape == (3, 4)


def test_slots_are_few(folder: Path) -> None:
    """Sources of similar lengths share a slot, and no more than a handful are kept."""
    with open_model(folder, replace(STATIC, buckets=[32])) as opened:
        for length in range(2, 16):
            opened.generate(torch.arange(3, 3 + length)[None], max_new_tokens=2)
        assert len(opened.runtime._spare) == 1
        for batch in range(2, 12):
            opened.generate(torch.arange(3, 3 + batch).view(batch, 1), max_new_tokens=2)
        assert len(opened.runtime._spare) == SPARE


def test_spare_slots_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a cache is refused, or a device runs full, those that nobody uses go."""
    with open_model(folder, replace(STATIC, buckets=[8, 16])) as opened:
        ids = torch.arange(3, 7)[None]
        opened.generate(ids, max_new_tokens=2)
        monkeypatch.setattr("accel.runtime.static_cache.room_left", lambda device: 0)
        opened.generate(ids.repeat(2, 1), max_new_tokens=2)
        assert [buffers.batch for _, buffers in opened.runtime._spare] == [2]


def test_attention_is_one_node_where_it_is_fused(folder: Path) -> None:
    """Two a layer, nothing turned around them, and the parts of a joined product cut once."""
    found = Counter(node.op_type for node in onnx.load(folder / STATIC_DECODE, load_external_data=False).graph.node)
    fused = found["MultiHeadAttention"] == 2 * 2
    assert fused is (found["Softmax"] == 0)
    assert found["FusedMatMul"] == (1 if fused else 0)  # with the tied embedding
    assert found["TensorScatter"] == 2 * 2
    assert found["Split"] == 2
    assert found["Transpose"] <= (2 if fused else 6)  # of the bias and the head; of keys


def test_a_step_of_one_token_turns_less(build: Build, tiny: Path) -> None:
    """Where it has a branch of its own: what is left are the bias's, the logits' and, in each attention, the keys'."""
    _, made = build(tiny, "merge", ("merge.strategy=three_branch",))
    merged = ir.load(made["merge"].folder / DECODER)
    turns = {graph.name: sum(node.op_type == "Transpose" for node in graph) for graph in merged.graphs()}
    assert turns["one_token"] <= 2 * 2 + 2
    assert turns["tokens"] >= turns["one_token"] + 2 * 4  # of queries and results, in each


def test_what_a_static_step_is_opened_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own keys and variables beside the others', and nothing of them for the merged decoder."""
    seen: dict[str, SessionSettings] = {}

    def noted(path: Path, settings: SessionSettings, *given: Any) -> Any:
        seen[path.name] = settings
        return open_session(path, settings, *given)

    for module in (onnx_runtime, static_cache):
        monkeypatch.setattr(module, "open_session", noted)
    key, name = "session.set_denormal_as_zero", "ACCEL_TEST_OF_A_STATIC_STEP"
    own = replace(STATIC, session={"session.inter_op": "1"}, static_session={key: "1"}, static_environment={name: "1"})
    monkeypatch.setenv(name, "0")
    open_model(folder, own).close()
    assert seen[STATIC_DECODE].session == {"session.inter_op": "1", key: "1"}
    assert seen[STATIC_DECODE].environment[name] == "1"
    assert key not in seen[DECODER].session
    assert name not in seen[DECODER].environment


def test_a_deployable_without_a_static_step(deployable: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs as it is, and says so."""
    assert not (deployable / STATIC_DECODE).exists()
    with open_model(deployable, STATIC) as opened:
        found = opened.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    assert found.shape[1] == 4
    assert "its caches grow" in caplog.text


def test_weights_lie_in_the_decoders_file(build: Build) -> None:
    """The static step stores none of its own where the decoder has a data file."""
    folder = build("accel://t5-g2p", "merge", ("runtime.static=true",))[1]["merge"].folder
    assert (folder / f"{DECODER}.data").stat().st_size > 1_000_000
    for name in (STATIC_DECODE, CROSS_CACHE):
        assert (folder / name).stat().st_size < 300_000
        assert not (folder / f"{name}.data").exists()


def test_both_decoders_read_the_same_weights(build: Build) -> None:
    """A number changed in the shared memory changes what each of the two sessions says."""
    folder = build("accel://t5-g2p", "merge", ("runtime.static=true",))[1]["merge"].folder
    weights = SharedWeights(torch.device("cpu"))
    decoder, static_cache = weights.of(folder / DECODER), weights.of(folder / STATIC_DECODE)
    assert len(static_cache) > 10
    assert set(static_cache) <= set(decoder)
    assert len({value.data_ptr() for value in (*decoder.values(), *static_cache.values())}) == len(decoder)
    settings = SessionSettings.of(STATIC, fuse=False)
    session = BoundSession(open_session(folder / STATIC_DECODE, settings, static_cache), torch.device("cpu"))
    runtime = StaticCacheRuntime(open_dynamic(folder, settings, "cpu", decoder), DecodeGraphs(session), [8])
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    hidden = runtime.encode({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    context = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def said() -> tuple[torch.Tensor, torch.Tensor]:
        first, state = runtime.prefill({"input_ids": ids[:, :1], **context})
        return first, runtime.decode({"input_ids": ids[:, 1:2]}, state)

    before = said()
    for value in static_cache.values():
        torch.from_dlpack(value).mul_(2)
    for old, new in zip(before, said(), strict=True):
        assert not torch.allclose(old, new)
