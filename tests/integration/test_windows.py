"""Layers with a sliding window: PyTorch's tokens, from caches of the window's length."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import DynamicCache

from accel import testing
from accel.errors import AccelError
from accel.models.cache import state_of
from accel.models.loading import load
from accel.runtime.layout import WINDOW, first_variant
from accel.testing.subject import UNIQUE_TOKENS
from tests.families import FAMILIES

NAMES = ["gemma3_text", "gemma2", "mistral", "t5gemma"]
LAYERS = {"mistral": 2}  # layers with a window, of 2; in other families 1
WINDOW_SIZE, RING = 8, 32
BUCKETS = [16, 48, 80, 160]
NEW = 60
TOKENS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "distinct": NEW - 2}

pytestmark = pytest.mark.slow


def prepared(name: str, shared: Path, artifacts: Path) -> Any:
    folder = shared / "families" / name
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(shared / f"{name}.lock"), testing.prepare(FAMILIES[name], folder, artifacts=artifacts)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def family(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    lock, prepare = prepared(request.param, shared, artifacts)
    with lock, prepare as subject:
        yield subject


@pytest.fixture(scope="module", params=["onnxruntime", "fused"])
def subject(request: pytest.FixtureRequest, family: testing.Subject) -> Iterator[testing.Subject]:
    """The family's deployable with static caches, whose generations move from one bucket to the next."""
    folder = family.artifacts["verify"].folder
    with load(folder, "cpu", static=True, buckets=BUCKETS, engine=request.param) as model:
        yield replace(family, model=model)


def buffers(subject: testing.Subject, bucket: int) -> Any:
    """The spare decode buffers of a bucket that were used last."""
    runtime: Any = subject.model.runtime
    return next(each for _, each in reversed(runtime.spare_buffers) if each.bucket == bucket)


def windowed(subject: testing.Subject) -> list[str]:
    """The caches of layers with a window."""
    runtime: Any = subject.model.runtime
    inputs = runtime._graphs.decode.inputs
    return [name for name in inputs if any(str(axis).startswith(WINDOW) for axis in inputs[name])]


def test_padded_batch(subject: testing.Subject) -> None:
    """The tokens, through three buckets or in one, and caches of a window's length in all that are longer."""
    subject.assert_same_tokens(**subject.inputs(3), **TOKENS)
    names = windowed(subject)
    assert len(names) == 2 * LAYERS.get(subject.eager.config.model_type, 1)
    runtime: Any = subject.model.runtime
    used_buckets = (48, 80)
    for bucket in used_buckets:
        used = buffers(subject, bucket)
        for name, cache in used.self_caches.items():
            assert cache.shape[2] == (RING if name in names else bucket)
    for bucket in BUCKETS[:3]:
        batch = 3
        size = 4 * batch * 2 * 16 * 2  # FP32, key and value heads of 16 features
        layers = len(names) // 2
        expected = size * (layers * min(RING, bucket) + (2 - layers) * bucket)
        assert runtime.cache_bytes(batch, bucket) == expected
        if bucket in used_buckets:
            assert sum(cache.nbytes for cache in buffers(subject, bucket).self_caches.values()) == expected


@pytest.mark.parametrize("rows", [1, 2])
def test_beams(subject: testing.Subject, rows: int) -> None:
    subject.assert_same_tokens(**subject.inputs(rows), **TOKENS, num_beams=3)


def test_what_the_caches_hold(subject: testing.Subject) -> None:
    """The last entries in order, zeros before them; all entries of other layers."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}
    expected, actual = subject.generate_both(**subject.inputs(), **options)
    assert torch.equal(actual.sequences, expected.sequences)
    caches = [
        getattr(each.past_key_values, "self_attention_cache", each.past_key_values) for each in (actual, expected)
    ]
    names, state = windowed(subject), state_of(actual.past_key_values)
    assert state is not None
    tokens = state.length
    views = dict(
        zip(state.views(), (each for layer in caches[0].layers for each in (layer.keys, layer.values)), strict=False)
    )
    right = [each for layer in caches[1].layers for each in (layer.keys, layer.values)]
    for (name, ours), theirs in zip(views.items(), right, strict=True):
        assert ours.shape[2] == tokens
        lost = tokens - RING if name in names else 0
        assert (ours[:, :, :lost] == 0).all()
        assert (ours[:, :, lost:] != 0).any(-1).all()
        torch.testing.assert_close(ours[:, :, -theirs.shape[2] :], theirs, rtol=1e-3, atol=1e-4)


def test_rows(subject: testing.Subject) -> None:
    """Sequences at positions of their own, before and behind the end of the window's caches."""
    lengths, steps, expected, found = (3, 20, 44), 40, [], []
    prompts = [subject.inputs(1, length) for length in lengths]
    with subject.model.rows(len(lengths), 100, 50) as rows, torch.inference_mode():
        for prompt in prompts:
            options = UNIQUE_TOKENS | {"max_new_tokens": steps, "min_new_tokens": steps}
            expected.append(subject.eager.generate(**prompt, **options)[0].tolist())  # type: ignore[operator]
        chosen, logits = {}, {}
        for number, prompt in enumerate(prompts):  # one more begins after each ten steps
            row = rows.claim()
            logits[row] = rows.prefill(row, **prompt)
            first = (
                [subject.eager.config.decoder_start_token_id]
                if subject.has_encoder
                else prompt["input_ids"][0].tolist()
            )
            chosen[row] = (number, first)
            for _ in range(10):
                decode_rows(rows, chosen, logits)
        while any(len(ids) < len(expected[number]) for number, ids in chosen.values()):
            decode_rows(rows, chosen, logits)
    found = dict(chosen.values())
    for number, ids in enumerate(expected):
        assert found[number][: len(ids)] == ids


def decode_rows(rows: Any, chosen: Any, logits: Any) -> None:
    """Choose a token in each row, none twice, and decode it."""
    tokens = torch.zeros(rows.capacity, dtype=torch.int64)
    for row, (_, ids) in chosen.items():
        allowed = logits[row].clone()
        allowed[[*ids, 2]] = -torch.inf
        ids.append(int(allowed.argmax()))
        tokens[row] = ids[-1]
    decoded = rows.step(tokens)
    logits.update({row: decoded[row] for row in chosen})


@pytest.mark.parametrize("candidates", [5, 40])
def test_assistant(subject: testing.Subject, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model checks its own proposals, and those of a twin, of which it refuses all but few: it drops their entries.

    More of them than the caches hold beyond the window are computed again.
    """
    with load(subject.artifacts["verify"].folder, "cpu", static=True, buckets=BUCKETS) as twin:
        twin.generation_config.num_assistant_tokens = candidates
        twin.generation_config.num_assistant_tokens_schedule = "constant"
        twin.generation_config.assistant_confidence_threshold = 0
        subject.assert_same_tokens(**subject.inputs(), **TOKENS, assistant_model=twin)
        decode = twin.runtime.decode
        monkeypatch.setattr(twin.runtime, "decode", lambda *inputs: decode(*inputs).roll(1, -1))
        subject.assert_same_tokens(**subject.inputs(), **TOKENS, assistant_model=twin)


def test_prompt_lookup(subject: testing.Subject) -> None:
    """Several tokens at once beside single ones: caches that grow, and static ones, in turn."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "no_repeat_ngram_size": 3}
    inputs = subject.inputs(1, 30)
    expected, _ = subject.generate_both(**inputs, **options)
    with torch.inference_mode():
        found = subject.model.generate(**inputs, **UNIQUE_TOKENS | options, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) > 10


def test_prompt_cache(subject: testing.Subject) -> None:
    """Prompts that share some of its tokens, fewer and more than the window's caches hold."""
    if subject.has_encoder:
        pytest.skip("prompt caches are for decoder-only models")
    ids = subject.ids(1, 45)
    cache = subject.model.cache_prompt(ids[:, :40])
    for shared in (40, 12):
        prompts = torch.cat([ids[:, :shared].repeat(2, 1), subject.ids(2, 4, seed=shared)], dim=1)
        expected, _ = subject.generate_both(input_ids=prompts, max_new_tokens=NEW, min_new_tokens=NEW)
        with torch.inference_mode():
            found = subject.model.generate(
                prompts, past_key_values=cache, **UNIQUE_TOKENS | {"max_new_tokens": NEW, "min_new_tokens": NEW}
            )
        assert torch.equal(found, expected)


SAMPLING = {"do_sample": True, "top_k": 30, "temperature": 2.0, "no_repeat_ngram_size": 0}


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["processors", "sampling on the device"])
@pytest.mark.parametrize("kept", [58, 30, 5])
def test_a_cache_that_is_cropped(
    family: testing.Subject,
    subject: testing.Subject,
    kept: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second turn continues from few of the first one's tokens: within the slack, and far behind it."""
    again: list[Any] = []
    runtime: Any = subject.model.runtime
    prefill = runtime.dynamic.prefill
    monkeypatch.setattr(runtime.dynamic, "prefill", lambda inputs: again.append(inputs) or prefill(inputs))
    expected, _ = second_turn(family.model, subject.inputs(3), kept, options, again)
    found, given = second_turn(subject.model, subject.inputs(3), kept, options, again)
    assert len(again) == (kept < 58)
    assert torch.equal(found, expected)
    if not subject.has_encoder:  # beside an encoder, PyTorch generates others from its own caches as well
        with torch.inference_mode():
            assert torch.equal(found, subject.eager.generate(**given))  # type: ignore[operator]


def second_turn(
    model: Any, inputs: Any, kept: int, options: dict[str, Any], again: list[Any]
) -> tuple[torch.Tensor, Any]:
    """The tokens that follow the first `kept` ones of a generation, and what they follow from."""
    options = UNIQUE_TOKENS | {"max_new_tokens": NEW, "min_new_tokens": NEW} | options
    torch.manual_seed(0)
    with torch.inference_mode():
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        assert len(set(first.sequences[0].tolist())) > 20
        again.clear()
        cache, sequences = first.past_key_values, first.sequences[:, : kept + 1]
        cache.crop(kept)
        state = state_of(cache)
        assert state is not None
        assert state.length == kept
        given = {**inputs, **UNIQUE_TOKENS, "max_new_tokens": 40, "min_new_tokens": 40, "no_repeat_ngram_size": 2}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = sequences
        else:
            prompt = inputs["attention_mask"][:, : kept + 1]
            given["attention_mask"] = torch.nn.functional.pad(prompt, (0, kept + 1 - prompt.shape[1]), value=1)
            given["input_ids"] = sequences
        return model.generate(**given, past_key_values=cache), given


def test_a_cache_from_elsewhere_that_is_cropped(subject: testing.Subject) -> None:
    """It can't be computed again, and the error says how far it can be cropped, and what to do."""
    if subject.has_encoder:
        pytest.skip("its encoder's output would be needed, too")
    ids = subject.ids(1, 50)
    cache = DynamicCache()
    with torch.inference_mode():
        subject.eager(input_ids=ids, past_key_values=cache)
        subject.model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(40)
        with pytest.raises(AccelError, match=r"cropped to 10 of 40 tokens: layers with a sliding window of 8 tokens"):
            cache.crop(10)


def test_graphs_without_the_pass(family: testing.Subject) -> None:
    """As earlier versions built them: whole caches in all layers."""
    from accel.cli.compose import compose, execute

    overrides = [each for each in family.fp16_overrides if not each.startswith(("precision", "verify.min", "merge."))]
    artifacts = execute(
        compose([*overrides, "precision=fp32", "convert.decode_passes.window_cache=false", "stage=merge"])
    )
    folder = artifacts["merge"].folder
    assert first_variant(folder).static_decode.is_file()
    with load(folder, "cpu", static=True, buckets=BUCKETS) as model:
        whole = replace(family, model=model)
        whole.assert_same_tokens(**whole.inputs(3), **TOKENS)
        assert windowed(whole) == []
        assert {cache.shape[2] for cache in buffers(whole, 80).self_caches.values()} == {80}
