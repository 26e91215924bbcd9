"""Rows of a running batch: a server's calls, mistakes in them, and deployables that can't have rows."""

import gc
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from accel import testing
from accel.errors import AccelError
from accel.models import rows as rows_module
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.runtime.layout import first_variant
from tests.conftest import Build

DOCS = Path(__file__).parents[2] / "docs" / "drop-in.md"
IDS = torch.arange(5, 14)


@pytest.fixture(scope="module")
def folder(build: Build, tiny: Path) -> Path:
    return build(tiny, "verify", ("runtime.static=true",))[1]["verify"].folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[AcceleratedModel]:
    with load(folder, "cpu", static=True, buckets=[8, 16]) as opened:
        yield opened


def test_example_in_the_documentation(gpt2: testing.Subject) -> None:
    """The example decodes more requests than there are rows; each has the tokens that `generate` gives it alone."""
    example = re.search(r"```python\n(.*?continuous.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    model, requests = gpt2.static, [{"input_ids": gpt2.ids(1, length, seed=length)[0]} for length in (9, 4, 12, 7, 5)]
    assert model is not None
    used = [request["input_ids"].tolist() for request in requests]

    def choose(number: int, logits: torch.Tensor) -> int:  # no token twice, as `no_repeat_ngram_size=1`
        logits = logits.index_fill(0, torch.tensor(used[number]), -torch.inf)
        used[number].append(int(logits.argmax()))
        return used[number][-1]

    names: dict[str, Any] = {"model": model, "requests": requests, "choose": choose}
    exec(example[1], names)
    end, expected = model.generation_config.eos_token_id, {}
    for number, request in enumerate(requests):
        tokens = model.generate(request["input_ids"][None], max_new_tokens=12, no_repeat_ngram_size=1)[0]
        expected[number] = [token for token in tokens[len(request["input_ids"]) :].tolist() if token != end]
    assert names["answers"] == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == len(requests)


def test_a_row_that_is_used_again(model: AcceleratedModel) -> None:
    """Nothing of the first sequence is left, though the second is shorter; idle rows have finite logits."""
    with model.rows(capacity=2, max_length=16, source_length=20) as rows:
        assert (rows.free, rows.max_length) == (2, 16)
        row = rows.claim()
        rows.prefill(row, input_ids=torch.arange(3, 21))
        for token in range(5, 12):
            assert rows.step([token, token]).isfinite().all()
        assert rows.length(row) == 8
        rows.release(row)
        again = rows.claim()
        assert again == row
        found = [rows.prefill(again, input_ids=IDS), rows.step([9, 0])[again]]
    with model.rows(capacity=2, max_length=16, source_length=20) as rows:
        row = rows.claim()
        expected = [rows.prefill(row, input_ids=IDS), rows.step([9, 0])[row]]
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)


def test_caches_go_back_to_the_model(model: AcceleratedModel) -> None:
    """Buffers of closed rows serve the next rows, and `generate` beside open ones has its own."""
    with model.rows(2, 16) as rows:
        row = rows.claim()
        before = rows.prefill(row, input_ids=IDS)
        model.generate(IDS[None].repeat(2, 1), max_new_tokens=12)
        assert torch.equal(rows.prefill(row, input_ids=IDS), before)
    rows.close()
    runtime: Any = model.runtime
    spare = [buffers for _, buffers in runtime.spare_buffers]
    with model.rows(2, 16) as rows:
        assert rows.cache._buffers in spare


def test_encoder_outputs_and_first_tokens(model: AcceleratedModel) -> None:
    """As given by the caller, whose mask hides padding."""
    padded = torch.cat([IDS, IDS.new_zeros(4)])[None]
    mask = (padded != 0).long()
    outputs = model.get_encoder()(padded, attention_mask=mask)
    with model.rows(2, 8, source_length=13) as rows:
        first, second = rows.claim(), rows.claim()
        expected = rows.prefill(first, input_ids=IDS, decoder_input_ids=torch.tensor([0, 7]))
        found = rows.prefill(
            second, encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=torch.tensor([[0, 7]])
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert rows.length(second) == 2
        logits = rows.step(torch.tensor([11, 11]))
        torch.testing.assert_close(logits[first], logits[second], rtol=1e-4, atol=1e-4)


def test_mistakes(model: AcceleratedModel) -> None:
    """Each is named, and leaves the other rows as they are."""
    with model.rows(2, 8, source_length=16) as rows:
        first, second = rows.claim(), rows.claim()
        with pytest.raises(AccelError, match="no row is free: all 2 are claimed"):
            rows.claim()
        with pytest.raises(ValueError, match="no row is prefilled"):
            rows.step([1, 1])
        expected = rows.prefill(first, input_ids=IDS)
        with pytest.raises(ValueError, match=r"has length 17 along its axis 'source', and in these rows 16"):
            rows.prefill(second, input_ids=torch.arange(3, 20))
        with pytest.raises(ValueError, match="the prompt has 9 tokens, a row holds 1 to 8"):
            rows.prefill(second, input_ids=IDS, decoder_input_ids=IDS)
        with pytest.raises(ValueError, match="2 sequences were given: a row takes one"):
            rows.prefill(second, input_ids=IDS[None].repeat(2, 1))
        with pytest.raises(ValueError, match="input_ids contains 999"):
            rows.prefill(second, input_ids=torch.tensor([999]))
        with pytest.raises(ValueError, match="past_key_values of type list: a row begins without"):
            rows.prefill(second, input_ids=IDS, past_key_values=[])
        with pytest.raises(TypeError, match="input_idz"):
            rows.prefill(second, input_ids=IDS, input_idz=IDS)
        with pytest.raises(ValueError, match=r"tokens has shape \[3\], expected \[2\]"):
            rows.step([1, 1, 1])
        with pytest.raises(ValueError, match="tokens contains -1"):
            rows.step([-1, 1])
        rows.release(second)
        for call in (rows.release, rows.length, lambda row: rows.prefill(row, input_ids=IDS)):
            with pytest.raises(ValueError, match=r"row 1 is not claimed: claimed are \[0\]"):
                call(second)
        for _ in range(7):
            rows.step([5, -1])
        with pytest.raises(ValueError, match=r"full rows: \[0\].* a row holds 8 tokens"):
            rows.step([5, 5])
        assert torch.equal(rows.prefill(first, input_ids=IDS), expected)
    with pytest.raises(RuntimeError, match="these rows are closed"):
        rows.claim()
    with pytest.raises(ValueError, match="capacity=0: expected at least 1"):
        model.rows(0, 8)


def test_models_without_rows(model: AcceleratedModel, deployable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic caches, and angles that depend on the length of the whole input."""
    with load(deployable, "cpu") as dynamic, pytest.raises(AccelError, match=r"dynamic ones.*static=True"):
        dynamic.rows(2, 8)
    monkeypatch.setattr(rows_module, "angles_depend_on_length", lambda config: True)
    with pytest.raises(AccelError, match="of this t5 model: its rotary embeddings depend on the length"):
        model.rows(2, 8)


def test_limits_of_the_runtime(folder: Path) -> None:
    """Batch sizes that were asked for, and the model's positions."""
    with load(folder, "cpu", static=True, buckets=[8], capture_batch_sizes=[2]) as model:
        with pytest.raises(AccelError, match="3 sequences at once"):
            model.rows(3, 8)
        model.runtime.buckets.limit = 100
        with pytest.raises(AccelError, match="max_length=101: the model has 100 positions"):
            model.rows(2, 101)


def test_deployable_with_one_position_for_all_rows(folder: Path, model: AcceleratedModel, tmp_path: Path) -> None:
    """As earlier versions built them: `generate` works, rows are refused."""
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    path = first_variant(old).static_decode
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        node.input[:] = ["positions" if name == "position" else name for name in node.input]
    one = helper.make_node("Shape", ["input_ids"], ["batch_of_ids"], start=0, end=1)
    proto.graph.node.insert(0, helper.make_node("Expand", ["position", "batch_of_ids"], ["positions"]))
    proto.graph.node.insert(0, one)
    kept = [value for value in proto.graph.input if value.name != "position"]
    del proto.graph.input[:]
    proto.graph.input.extend([*kept, helper.make_tensor_value_info("position", TensorProto.INT64, [])])
    path.unlink()  # a hard link to the original
    onnx.save(proto, path)
    ids = torch.stack([IDS, IDS + 20])
    with load(old, "cpu", static=True, buckets=[8, 16], check=False) as opened:
        expected = model.generate(ids, max_new_tokens=12)
        assert torch.equal(opened.generate(ids, max_new_tokens=12), expected)
        with pytest.raises(AccelError, match="one position for all rows: an earlier version of accel made it"):
            opened.rows(2, 8)


def choose(logits: torch.Tensor, used: list[int]) -> int:
    """Append the most likely token that the sequence doesn't have yet."""
    used.append(int(logits.index_fill(0, torch.tensor(used), -torch.inf).argmax()))
    return used[-1]


def test_rows_that_move(model: AcceleratedModel) -> None:
    """More, fewer, longer and shorter rows midway, with inputs of other lengths: each sequence is what it is alone."""
    sources = [torch.arange(5, 14), torch.arange(30, 34), torch.arange(50, 70)]
    expected = [
        model.generate(source[None], max_new_tokens=12, min_new_tokens=12, no_repeat_ngram_size=1)[0].tolist()
        for source in sources
    ]
    found: list[list[int]] = [[0], [0], [0]]
    with model.rows(3, 8, source_length=16) as rows:
        spare, first, second = rows.claim(), rows.claim(), rows.claim()
        rows.release(spare)
        of = {first: 0, second: 1}
        last = {row: choose(rows.prefill(row, input_ids=sources[of[row]]), found[of[row]]) for row in of}
        for step in range(11):
            if step == 3:
                moved = rows.resize(2, 16, source_length=32)
                of, last = ({moved[row]: value for row, value in each.items()} for each in (of, last))
                assert sorted(of) == [0, 1]
            if step == 5:
                rows.resize(4, 16)
                row = rows.claim()
                of[row] = 2
                last[row] = choose(rows.prefill(row, input_ids=sources[2]), found[2])
            if step == 7:
                row = next(row for row in of if of[row] == 2)
                rows.release(row)
                del of[row], last[row]
                rows.resize(2, 16, source_length=16)
            logits = rows.step([last.get(row, 0) for row in range(rows.capacity)])
            last = {row: choose(logits[row], found[of[row]]) for row in of}
        with pytest.raises(ValueError, match="1 rows of 8 tokens with inputs of 16 can't hold the 2 claimed rows"):
            rows.resize(1, 8)
    assert found[:2] == [tokens[:13] for tokens in expected[:2]]
    assert found[2] == expected[2][: len(found[2])]
    assert len(found[2]) == 4


def test_sources_prefilled_together(model: AcceleratedModel) -> None:
    """Padded to the longest, each has the logits that it has alone, then and one token later."""
    ids = torch.zeros(2, 9, dtype=torch.int64)
    ids[0], ids[1, :4] = IDS, torch.arange(40, 44)
    with model.rows(3, 8, source_length=16) as rows:
        taken = [rows.claim() for _ in range(3)]
        with pytest.raises(ValueError, match="2 sequences were given for 3 rows"):
            rows.prefill_together(taken, input_ids=ids)
        alone = [rows.prefill(row, input_ids=source) for row, source in zip(taken, (ids[0], ids[1, :4]), strict=False)]
        expected = torch.stack([*alone, *rows.step([7, 9, 0])[:2]])
        together = rows.prefill_together(taken[:2], input_ids=ids, attention_mask=(ids != 0).long())
        rows.release(taken[0])
        rows.resize(2, 8, source_length=5)  # the padding of the second one's input goes, the input stays
        found = torch.cat([together, rows.step([9, 0])[:1]])
    expected = expected[[0, 1, 3]]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sources_whose_first_token_is_a_step(model: AcceleratedModel, gpt2: testing.Subject) -> None:
    """Each has the logits that it has alone, beside a row that goes on, in a row that held another sequence before."""
    ids = torch.zeros(2, 9, dtype=torch.int64)
    ids[0, :4], ids[1] = torch.arange(40, 44), IDS
    with model.rows(3, 8, source_length=16) as rows:
        first, second, third = (rows.claim() for _ in range(3))
        rows.prefill(second, input_ids=torch.arange(60, 76))  # longer, and of more tokens
        rows.step([0, 7, 0])
        rows.release(second)
        assert rows.claim() == second
        going_on = rows.prefill(third, input_ids=torch.arange(20, 33))
        rows.begin_together([second, first], input_ids=ids, attention_mask=(ids != 0).long())
        assert (rows.length(first), rows.length(second), rows.length(third)) == (0, 0, 1)
        assert rows.cache.source_lengths == {second: 4, first: 9, third: 13}
        found = [rows.step([0, 0, int(going_on.argmax())]), rows.step([7, 9, 5])]
        rows.resize(3, 16, source_length=13)
        found.append(rows.step([3, 4, 6]))
    with model.rows(3, 8, source_length=16) as rows:
        taken = [rows.claim() for _ in range(3)]
        sources = (ids[1], ids[0, :4], torch.arange(20, 33))
        alone = [rows.prefill(row, input_ids=source) for row, source in zip(taken, sources, strict=True)]
        torch.testing.assert_close(found[0][:2], torch.stack(alone[:2]), rtol=1e-4, atol=1e-4)
        one, other = taken.pop(), rows.step([7, 9, int(going_on.argmax())])
        torch.testing.assert_close(found[0][one], other[one], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1][:2], other[:2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[2][:2], rows.step([3, 4, 5])[:2], rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 0.1
    assert gpt2.static is not None
    with gpt2.static.rows(1, 8) as rows, pytest.raises(AccelError, match="no graph computes the cross-attention"):
        rows.begin_together([rows.claim()], input_ids=IDS)


def test_prompt_in_parts(gpt2: testing.Subject) -> None:
    """Another row is stepped between the parts, and the rows move; a snapshot of a part serves another prompt."""
    model = gpt2.static
    assert model is not None
    prompt, other = gpt2.ids(1, 20, seed=1)[0], gpt2.ids(1, 5, seed=2)[0]
    similar = torch.cat([prompt[:12], gpt2.ids(1, 6, seed=3)[0]])
    with model.rows(3, 64) as rows:
        idle, first, second = rows.claim(), rows.claim(), rows.claim()
        rows.release(idle)
        rows.prefill(first, input_ids=other)
        expected = rows.prefill(second, input_ids=prompt), rows.step([0, 7, 9])[1:], rows.step([0, 8, 5])[1:]
        similar_alone = rows.prefill(second, input_ids=similar)
    with model.rows(3, 64) as rows:
        idle, first, second = rows.claim(), rows.claim(), rows.claim()
        rows.release(idle)
        rows.prefill(first, input_ids=other)
        parts = rows.begin(second, input_ids=prompt)
        with pytest.raises(ValueError, match="a snapshot needs a prefill that has begun"):
            parts.snapshot()
        assert parts.advance(7) is None
        assert parts.advance(5) is None
        snapshot = parts.snapshot()
        logits = rows.step([0, 7, 0])[first]
        moved = rows.resize(2, 64)
        assert (parts.row, parts.computed, parts.remaining) == (moved[second], 12, 8)
        first, second = moved[first], moved[second]
        found = parts.advance()
        assert found is not None
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, expected[1][0], rtol=1e-4, atol=1e-4)
        tokens = torch.zeros(2, dtype=torch.int64)
        tokens[first], tokens[second] = 8, 9
        logits = rows.step(tokens)
        torch.testing.assert_close(logits[first], expected[2][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[second], expected[1][1], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="is complete"):
            parts.advance()
        assert snapshot.get_seq_length() == 12
        found = rows.prefill(second, input_ids=similar, past_key_values=snapshot)
        torch.testing.assert_close(found, similar_alone, rtol=1e-4, atol=1e-4)


def test_closed_rows_hold_nothing(folder: Path) -> None:
    """Buffers and the mapped files of the weights end with the model, though the caller still has the rows."""
    with load(folder, "cpu", static=True) as model:
        rows = model.rows(2, 8, 16)
        rows.prefill(rows.claim(), input_ids=IDS[:4])
        rows.step([3, 3])
        buffers = weakref.ref(rows.cache._buffers)
        rows.close()
        gc.collect()
        assert buffers() is not None, "kept for the next generation"
    gc.collect()
    assert buffers() is None
    assert not rows.cache.lengths
