"""Beams by the fused engine, which reads entries from the rows that computed them: ONNX Runtime's tokens, no copies."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import accel
from accel import testing
from accel.config.engines import FUSED, ONNXRUNTIME
from accel.runtime.beam_cache import BeamAncestry
from accel.runtime.decode_step import FusedStep
from tests.families import FAMILIES

FAST = {"gpt2"}  # exported in the fast tier anyway
NAMES = ("t5", "bart", "whisper", "llama", "gpt2", "falcon", "gemma2", "mistral")  # the last two have sliding windows
BUCKETS = [16, 64]
NEW = 40
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "no_repeat_ngram_size": 1}


def family(name: str) -> Any:
    """Return the parameter of one family, whose tests run in one worker."""
    marks = [pytest.mark.xdist_group(name)]
    return pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.fixture(scope="module", params=[family(name) for name in NAMES])
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """One family's deployable, run by the fused engine; `static` is the same by ONNX Runtime."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{request.param}.lock"),
        testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts) as made,
    ):
        built = made.artifacts["verify"].folder
        with (
            accel.load(built, "cpu", static=True, buckets=BUCKETS, engine=FUSED) as fused,
            accel.load(built, "cpu", static=True, buckets=BUCKETS, engine=ONNXRUNTIME) as plain,
        ):
            yield replace(made, model=fused, static=plain)


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let beams be reordered by the table alone; the lengths at which it was."""
    lengths: list[int] = []
    follow = BeamAncestry.follow

    def count(ancestry: BeamAncestry, index: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
        changes = follow(ancestry, index, length)
        lengths.append(int(length) if changes.any() else 0)
        return changes

    def refuse(*_: Any) -> None:
        raise AssertionError("entries are copied")

    monkeypatch.setattr(BeamAncestry, "follow", count)
    monkeypatch.setattr(BeamAncestry, "reorder", refuse)
    monkeypatch.setattr(BeamAncestry, "collect", refuse)
    return lengths


def beams(model: Any, subject: testing.Subject, rows: int, **options: Any) -> torch.Tensor:
    """Return the ids of two beams an input, of padded rows."""
    torch.manual_seed(0)
    ids: torch.Tensor = model.generate(
        **subject.inputs(rows), **OPTIONS, num_beams=3, num_return_sequences=2, **options
    )
    return ids


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens(subject: testing.Subject, rows: int, sample: bool, request: pytest.FixtureRequest) -> None:
    """Those of ONNX Runtime; rows change at most steps. An encoder-decoder's caches move to a larger bucket."""
    expected = beams(subject.static, subject, rows, do_sample=sample)
    assert all(len(set(row.tolist())) > NEW - 2 for row in expected)
    changed: list[int] = request.getfixturevalue("no_copies")  # from here on
    assert torch.equal(beams(subject.model, subject, rows, do_sample=sample), expected)
    assert sum(length > 0 for length in changed) > NEW / 2


def test_what_follows_beams(subject: testing.Subject) -> None:
    """Caches that are read after beams spread them over rows hold what ONNX Runtime's do; greedy rows are their own."""
    greedy = {**subject.inputs(3), **OPTIONS}
    expected = subject.static.generate(**greedy)
    options = {**OPTIONS, "num_beams": 3, "return_dict_in_generate": True}
    theirs, ours = (model.generate(**subject.inputs(3), **options) for model in (subject.static, subject.model))
    assert torch.equal(ours.sequences, theirs.sequences)
    names = ("self_attention_cache", "past_key_values")
    caches = [getattr(each.past_key_values, names[0], each.past_key_values) for each in (ours, theirs)]
    layers = list(zip(*(cache.layers for cache in caches), strict=True))
    assert len(layers) == 2
    for mine, other in layers:
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-3, atol=1e-4)
    assert torch.equal(subject.model.generate(**greedy), expected)


@pytest.mark.parametrize("tabled", [(16, 64), (16,), (64,), ()], ids=str)
def test_buckets(subject: testing.Subject, tabled: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches move from one bucket to the next, in each of which entries are read by the table or rows are copied."""
    runtime: Any = subject.model.runtime
    bind, used = FusedStep.bind_by_ancestry, set()

    def refuse(step: FusedStep, inputs: Any, outputs: Any, ancestry: torch.Tensor) -> Any:
        used.add(ancestry.shape[1])
        return bind(step, inputs, outputs, ancestry) if ancestry.shape[1] in tabled else None

    monkeypatch.setattr(FusedStep, "bind_by_ancestry", refuse)
    monkeypatch.setattr(runtime, "room", lambda batch, tokens, reserved: tokens)
    runtime.spare_buffers.clear()
    try:
        assert torch.equal(beams(subject.model, subject, 2), beams(subject.static, subject, 2))
    finally:
        runtime.spare_buffers.clear()
    assert used == {16, 64}
