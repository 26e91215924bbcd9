"""Static caches: same contents as PyTorch's caches after every operation, at constant addresses."""

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
from accel.runtime.buckets import Buckets
from accel.runtime.cache_views import CacheViews
from accel.runtime.decode_buffers import DecodeGraphs
from accel.runtime.decode_step import SessionStep
from accel.runtime.dynamic_cache import open_dynamic
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import first_variant
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.spare_buffers import LEAST_SPARE
from accel.runtime.static_cache import StaticCacheRuntime
from accel.runtime.weights import SharedWeights
from tests.conftest import Build
from tests.runtime.test_dynamic_cache import BATCH, PAST, Both

STATIC = runtime_preset("cpu", static=True, buckets=[8, 12, 32])


FUSED = (  # as on a GPU
    "convert.fuse_attention=[encoder,static_decode]",
    "convert.fuse_transposed_matmul=true",
    "convert.transpose_weights=true",
    "merge.strategy=three_branch",
)


@pytest.fixture(scope="module", params=[(), FUSED], ids=["plain", "fused"])
def folder(request: pytest.FixtureRequest, build: Build, tiny: Path) -> Path:
    return build(tiny, "verify", ("runtime.static=true", *request.param))[1]["verify"].folder


@pytest.fixture(scope="module", params=["onnxruntime", "fused"])
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[AcceleratedModel]:
    with open_model(folder, replace(STATIC, engine=request.param)) as opened:
        assert opened.runtime.engine == request.param
        yield opened


@pytest.fixture
def both(model: AcceleratedModel, tiny: Path) -> Both:
    return Both(model, T5ForConditionalGeneration.from_pretrained(tiny).eval())


def decode(both: Both, new: int = 1) -> None:
    """Decode `new` tokens and compare the logits."""
    ids = torch.arange(3, 3 + both.state.batch * new).view(-1, new) + both.state.length
    found = both.model.runtime.decode({"input_ids": ids}, both.state)
    torch.testing.assert_close(found, both.pytorch(ids), rtol=1e-4, atol=1e-4)


def test_caches_after_twenty_decode_steps(both: Both) -> None:
    """Across buckets, with one padded source: the logits of every decode step and the final caches equal PyTorch's."""
    seen = []
    for _ in range(20):
        decode(both)
        seen.append(both.state.buffers.bucket)
    assert both.state.length == PAST + 20
    assert sorted(set(seen)) == [8, 12, 32]
    both.assert_same_caches()


def test_written_in_place(both: Both) -> None:
    """Within a bucket caches keep their address, and a decode step changes only one position."""
    decode(both)
    held = both.state.buffers.self_caches["past_key_values.1.decoder.value"]
    held[:, :, PAST + 1] = 0  # as left by an earlier generation
    before, address = held.clone(), held.data_ptr()
    decode(both)
    assert both.state.buffers.self_caches["past_key_values.1.decoder.value"].data_ptr() == address
    changed = (held != before).any(dim=(0, 1, 3))
    assert changed.nonzero().flatten().tolist() == [PAST + 1]


def test_logits_are_not_overwritten(both: Both) -> None:
    """A decode step returns logits that the next one doesn't overwrite."""
    ids = torch.full((BATCH, 1), 7)
    first = both.model.runtime.decode({"input_ids": ids}, both.state)
    kept = first.clone()
    both.model.runtime.decode({"input_ids": ids + 1}, both.state)
    assert torch.equal(first, kept)


def test_several_tokens_and_crop(both: Both) -> None:
    """As in assisted decoding: several tokens at once, some of them dropped, across the end of a bucket."""
    decode(both, 4)
    both.state.crop(PAST + 1)
    both.cache.crop(-3)
    both.assert_same()
    decode(both)
    assert both.state.buffers.bucket == 12


def test_beams(both: Both) -> None:
    """Sequences are repeated, then reordered within each input."""
    both.expand_then_reorder()


def test_buffers_are_cleared(both: Both, model: AcceleratedModel) -> None:
    """Decode buffers are reused, and values of the earlier generation, even NaN, have no effect."""
    decode(both)
    buffers = both.state.buffers
    for cache in buffers.self_caches.values():
        cache.fill_(torch.nan)
    del both.state
    again = Both(model, both.eager)
    decode(again)
    assert again.state.buffers is buffers
    again.assert_same()


def test_the_first_token_is_a_decode_step(both: Both, model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token doesn't run on the merged decoder, and all caches equal PyTorch's in reused buffers."""
    buffers = Both(model, both.eager, past=1).state.buffers
    for tensor in (*buffers.self_caches.values(), *buffers.constants.values()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    monkeypatch.setattr(model.runtime.dynamic, "prefill", pytest.fail)
    first = Both(model, both.eager, past=1)
    assert first.state.buffers is buffers
    for _ in range(9):
        decode(first)
    monkeypatch.undo()
    first.assert_same()
    first.expand_then_reorder()


def test_one_latency_a_token(model: AcceleratedModel) -> None:
    """The timer measures one latency per token, the first one included."""
    timing = time_generation(
        model, {"input_ids": torch.tensor([[5, 9, 7]])}, fixed_length_options(5, 1, use_cache=True)
    )
    assert len(timing.latencies) == 5


def test_the_first_token_without_its_graph(folder: Path, tiny: Path, tmp_path: Path) -> None:
    """Without the cross-attention cache graph a generation starts on the merged decoder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    first_variant(tmp_path).cross_cache.unlink()
    with open_model(tmp_path, STATIC) as opened:
        Both(opened, T5ForConditionalGeneration.from_pretrained(tiny).eval(), past=1).assert_same()


def test_two_generations_at_once(both: Both, model: AcceleratedModel, tiny: Path) -> None:
    """Two generations use different decode buffers."""
    other = Both(model, both.eager)
    decode(both, 1)
    other.assert_same()
    both.assert_same()


@pytest.mark.parametrize("limit", [None, 33, 32])
def test_longer_than_the_largest_bucket(both: Both, model: AcceleratedModel, limit: int | None) -> None:
    """Longer buckets follow up to the model's number of positions, and then caches that grow."""
    model.runtime.buckets.limit = limit
    try:
        seen = []
        for _ in range(40 - PAST):
            decode(both)
            seen.append(both.state.buffers.bucket if both.state.buffers else 0)
    finally:
        model.runtime.buckets.limit = None
    both.assert_same_caches()
    expected = {None: [8, 12, 32, 48], 33: [8, 12, 32, 33, 0], 32: [8, 12, 32, 0]}
    assert list(dict.fromkeys(seen)) == expected[limit]
    both.expand_then_reorder()


def test_a_copy_continues_on_its_own(both: Both) -> None:
    """Neither state sees the other's tokens, be the caches static or dynamic."""
    for static in (False, True):
        if static:
            decode(both)
        assert (both.state.buffers is not None) is static
        copy, length = both.state.copy(), both.state.length
        for _ in range(4):
            both.model.runtime.decode({"input_ids": torch.full((BATCH, 1), 9)}, copy)
        assert (copy.length, both.state.length) == (length + 4, length)
        both.assert_same_caches()


def test_bucket_lengths() -> None:
    """Those given, then powers of 2 and the means between them, none longer than the model's number of positions."""
    buckets = Buckets([64, 100], limit=1500)
    needed = (1, 64, 65, 101, 129, 193, 1025, 1500, 1501)
    assert [buckets.smallest(tokens) for tokens in needed] == [64, 64, 100, 128, 192, 256, 1500, 1500, None]


def test_batch_sizes_that_are_not_captured(folder: Path) -> None:
    """Other batch sizes are refused with the allowed ones named; those are captured when the model is opened."""
    only = replace(STATIC, capture_batch_sizes=[2, 6], buckets=[8, 16])
    ids = torch.arange(3, 9).view(3, 2)
    with open_model(folder, only) as opened:
        assert [(buffers.batch, buffers.bucket) for _, buffers in opened.runtime.spare_buffers] == [
            (2, 8),
            (2, 16),
            (6, 8),
            (6, 16),
        ]
        with pytest.raises(AccelError, match=r"3 sequences at once.*runtime.capture_batch_sizes=\[2, 6\]"):
            opened.generate(ids, max_new_tokens=3)
        assert opened.generate(ids[:2], max_new_tokens=3).shape == (2, 4)
        assert opened.generate(ids, num_beams=2, max_new_tokens=3).shape == (3, 4)


def test_buffers_outlive_inference_mode(model: AcceleratedModel) -> None:
    """Those that a generation in inference mode allocates serve a later one outside of it."""
    model.runtime.spare_buffers.clear()
    ids = torch.arange(3, 9).view(2, 3)
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=6, num_beams=2)
    (kept,) = model.runtime.spare_buffers
    assert torch.equal(model.generate(ids, max_new_tokens=6, num_beams=2), expected)
    assert model.runtime.spare_buffers == [kept]


def test_spare_buffers_are_limited(folder: Path) -> None:
    """Sources of similar lengths share decode buffers, and no more than `LEAST_SPARE` are kept."""
    with open_model(folder, replace(STATIC, buckets=[32])) as opened:
        for length in range(2, 16):
            opened.generate(torch.arange(3, 3 + length)[None], max_new_tokens=2)
        assert len(opened.runtime.spare_buffers) == 1
        for batch in range(2, 12):
            opened.generate(torch.arange(3, 3 + batch).view(batch, 1), max_new_tokens=2)
        assert len(opened.runtime.spare_buffers) == LEAST_SPARE


def test_spare_buffers_are_freed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare buffers are freed when the device has too little memory for new ones."""
    with open_model(folder, replace(STATIC, buckets=[8, 16])) as opened:
        ids = torch.arange(3, 7)[None]
        opened.generate(ids, max_new_tokens=2)
        free = iter([0, 1e9])
        monkeypatch.setattr("accel.runtime.static_cache.free_device_memory", lambda device: next(free))
        opened.generate(ids.repeat(2, 1), max_new_tokens=2)
        assert [buffers.batch for _, buffers in opened.runtime.spare_buffers] == [2]


def test_no_memory_for_a_static_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens come from caches that grow, and a warning gives the size."""
    ids = torch.arange(3, 7)[None]
    with open_model(folder, replace(STATIC, buckets=[64])) as opened:
        expected = opened.generate(ids, max_new_tokens=9, num_beams=2)
        opened.runtime.spare_buffers.clear()
        monkeypatch.setattr("accel.runtime.static_cache.free_device_memory", lambda device: 0)
        assert torch.equal(opened.generate(ids, max_new_tokens=9, num_beams=2), expected)
        assert not opened.runtime.spare_buffers
    assert "a static cache for 2 sequences of 64 tokens needs" in caplog.text


def test_attention_is_one_node_where_it_is_fused(folder: Path) -> None:
    """Two attention nodes a layer without transposes around them, and one split per packed projection."""
    found = Counter(
        node.op_type for node in onnx.load(first_variant(folder).static_decode, load_external_data=False).graph.node
    )
    fused = found["MultiHeadAttention"] == 2 * 2
    assert fused is (found["Softmax"] == 0)
    assert found["FusedMatMul"] == (2 * 6 + 1 if fused else 0)  # all weights are stored [out, in]
    assert found["MatMul"] == (0 if fused else 2 * (6 + 4) + 1)
    assert found["TensorScatter"] == 2 * 2
    assert found["Split"] == 2
    assert found["Transpose"] <= (2 if fused else 6)  # of the bias and the head; of keys


def test_a_branch_for_one_token_has_fewer_transposes(build: Build, tiny: Path) -> None:
    """The remaining transposes are the position bias's, the logits' and, in each attention, the keys'."""
    _, made = build(tiny, "merge", ("merge.strategy=three_branch", "convert.fuse_causal_attention=false"))
    merged = ir.load(first_variant(made["merge"].folder).decoder)
    turns = {graph.name: sum(node.op_type == "Transpose" for node in graph) for graph in merged.graphs()}
    assert turns["one_token"] <= 2 * 2 + 2
    assert turns["tokens"] >= turns["one_token"] + 2 * 4  # of queries and results, in each


def test_settings_of_the_static_decode_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own session entries and variables besides the common ones; the merged decoder has only the latter."""
    seen: dict[str, SessionSettings] = {}

    def record(path: Path, settings: SessionSettings, *arguments: Any) -> Any:
        seen[path.name] = settings
        return open_session(path, settings, *arguments)

    for module in (onnx_runtime, static_cache):
        monkeypatch.setattr(module, "open_session", record)
    key, name = "session.set_denormal_as_zero", "ACCEL_TEST_OF_STATIC_DECODE"
    own = replace(STATIC, session={"session.inter_op": "1"}, static_session={key: "1"}, static_environment={name: "1"})
    monkeypatch.setenv(name, "0")
    open_model(folder, own).close()
    decoder, static_decode = first_variant(folder).decoder.name, first_variant(folder).static_decode.name
    assert seen[static_decode].session == {"session.inter_op": "1", key: "1"}
    assert seen[static_decode].environment[name] == "1"
    assert key not in seen[decoder].session
    assert name not in seen[decoder].environment


def test_a_deployable_without_a_static_decode_graph(deployable: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The deployable runs with dynamic caches and logs it."""
    assert not first_variant(deployable).static_decode.exists()
    with open_model(deployable, STATIC) as opened:
        found = opened.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    assert found.shape[1] == 4
    assert "dynamic caches are used" in caplog.text


def test_weights_are_stored_in_the_decoders_file(build: Build) -> None:
    """The static graphs store no copy of weights that are in the decoder's data file, in either layout."""
    sizes = set()
    for more in ((), FUSED):
        _, made = build("accel://t5-g2p", "merge", ("runtime.static=true", *more))
        files = first_variant(made["merge"].folder)
        sizes.add(made["merge"].summary["shared_bytes"])
        assert files.decoder.with_suffix(".onnx_data").stat().st_size > 1_000_000
        for path in (files.static_decode, files.cross_cache):
            assert path.stat().st_size < 300_000
            assert not path.with_suffix(".onnx_data").exists()
    assert len(sizes) == 1  # prefill and decode have the same weights in common


def test_both_decoders_read_the_same_weights(build: Build) -> None:
    """A change of the shared memory changes the outputs of both sessions."""
    folder = build("accel://t5-g2p", "merge", ("runtime.static=true",))[1]["merge"].folder
    weights = SharedWeights(torch.device("cpu"))
    files = first_variant(folder)
    decoder, static_decode = weights.initializers(files.decoder), weights.initializers(files.static_decode)
    assert len(static_decode) > 10
    assert set(static_decode) <= set(decoder)
    assert len({value.data_ptr() for value in (*decoder.values(), *static_decode.values())}) == len(decoder)
    settings = SessionSettings.of(STATIC, fuse=False)
    session = BoundSession(open_session(files.static_decode, settings, static_decode), torch.device("cpu"))
    graphs = DecodeGraphs(SessionStep(session))
    runtime = StaticCacheRuntime(open_dynamic(files, settings, "cpu", decoder), graphs, Buckets([8]))
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    hidden = runtime.encode({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    context = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        first, state = runtime.prefill({"input_ids": ids[:, :1], **context})
        return first, runtime.decode({"input_ids": ids[:, 1:2]}, state)

    before = logits()
    for value in static_decode.values():
        torch.from_dlpack(value).mul_(2)
    for old, new in zip(before, logits(), strict=True):
        assert not torch.allclose(old, new)


def test_a_generation_makes_each_cache_a_tensor_a_few_times(
    model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()
    original = CacheViews.__getitem__

    def counted(views: CacheViews, name: str) -> torch.Tensor:
        made[name] += 1
        return original(views, name)

    monkeypatch.setattr(CacheViews, "__getitem__", counted)
    model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, min_new_tokens=6)
    assert made, "caches are made tensors for transformers' cache object"
    assert max(made.values()) <= 4, "else every layer makes the tensors of all layers"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Buckets of the decode buffers that are taken."""
    buckets: list[int] = []
    original = StaticCacheRuntime.take_buffers

    def noted(runtime: StaticCacheRuntime, batch: int, capacity: int, constants: Any) -> Any:
        buffers = original(runtime, batch, capacity, constants)
        buckets.append(buffers.bucket if buffers else 0)
        return buffers

    monkeypatch.setattr(StaticCacheRuntime, "take_buffers", noted)
    return buckets


TWENTY_FOUR = {"max_new_tokens": 24, "min_new_tokens": 24}


def test_steps_that_read_whole_caches_move_from_bucket_to_bucket(model: AcceleratedModel, taken: list[int]) -> None:
    """Those of both engines do on the CPU: only the fused engine's kernel reads no more than is written."""
    model.generate(torch.tensor([[5, 6, 7, 8]]), **TWENTY_FOUR)
    assert taken == [8, 12, 32]


def test_steps_that_read_what_is_written_get_room_at_once(
    model: AcceleratedModel, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is asked for each number of sequences: here those of two are handed over to ONNX Runtime."""
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, **TWENTY_FOUR)
    monkeypatch.setattr(model.runtime._graphs.decode, "reads_prefix", lambda batch: batch == 1)
    taken.clear()
    assert torch.equal(model.generate(ids, **TWENTY_FOUR), expected)
    assert taken == [8, 32]  # the first token's, before it is known how many follow
    taken.clear()
    model.generate(ids.repeat(2, 1), **TWENTY_FOUR)
    assert taken == [8, 12, 32]


def test_room_is_given_back_where_binding_shows_that_whole_caches_are_read(
    model: AcceleratedModel, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel can't run may show only when tensors are bound."""
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, **TWENTY_FOUR)
    monkeypatch.setattr(model.runtime._graphs.decode, "reads_prefix", lambda batch: 32 not in taken)
    taken.clear()
    assert torch.equal(model.generate(ids, **TWENTY_FOUR), expected)
    assert taken == [8, 32, 12, 32]
