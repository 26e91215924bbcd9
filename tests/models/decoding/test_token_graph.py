"""One graph a token: replayed decode steps with the selection of the next ids give the tokens of transformers' loops.

On the CPU a stand-in replays the recorded operations: see `tests/runtime/replay.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from accel import testing
from accel.benchmark.timer import GenerationTimer
from accel.config.presets import runtime_preset
from accel.models.decoding import stop_poller
from accel.models.generation import AcceleratedModel
from accel.models.loading import open_model
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.layout import IDS, MASK, POSITION, POSITION_IDS
from accel.runtime.token_graph import MAX_TOKEN_GRAPHS, TokenGraph
from tests.conftest import Build
from tests.models.test_decoding import OPTIONS, TEXTS, generate_with_both_loops
from tests.runtime.replay import Recorder, ReplayedCallable, replay_token_graphs

BUCKETS = [8, 16, 64]
ON_THE_HOST = {"repetition", "suppressed", "beams, least length"}  # processors that read the ids


@pytest.fixture(scope="module")
def folder(build: Build) -> Path:
    return build("accel://t5-g2p", "merge", ("runtime.static=true",))[1]["merge"].folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[AcceleratedModel]:
    with open_model(folder, replace(runtime_preset("cpu", static=True), buckets=BUCKETS)) as model:
        yield model


@pytest.fixture
def model(opened: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[AcceleratedModel]:
    """The trained model, whose tokens are replayed, with a poll lag as on a GPU."""
    replay_token_graphs(monkeypatch)
    monkeypatch.setattr(stop_poller, "poll_lag", lambda device: 3)
    runtime: Any = opened.runtime
    runtime.spare_buffers.clear()
    yield opened
    runtime.spare_buffers.clear()


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, Tensor]:
    """Padded inputs for `TEXTS`."""
    return dict(AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt"))


def captures(kind: str = "the graph of a token") -> int:
    """Return how many tokens, or other functions, were recorded so far."""
    return sum(name.startswith(kind) for name in ReplayedCallable.recorded)


def end_static_caches(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Let no static cache be longer than `longest` tokens."""
    runtime: Any = model.runtime
    take = runtime.take_buffers

    def take_short(rows: int, capacity: int, shapes: Any) -> Any:
        return None if capacity > longest else take(rows, capacity, shapes)

    monkeypatch.setattr(runtime, "take_buffers", take_short)


def graphs(model: AcceleratedModel) -> list[Any]:
    """Return all graphs that are kept with spare buffers."""
    runtime: Any = model.runtime
    return [graph for _, buffers in runtime.spare_buffers for graph in buffers.token_graphs.values()]


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_equal(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Over three buckets; a later generation replays the graphs of earlier ones, and draws what transformers draws."""
    options = {"max_new_tokens": 40} | OPTIONS[name]
    recorded = []
    for _ in range(4):
        expected, found = generate_with_both_loops(model, monkeypatch, **batch, **options)
        assert torch.equal(found, expected), (found.tolist(), expected.tolist())
        recorded.append(captures())
    assert recorded[0] == 0
    assert recorded[2] == recorded[3]
    assert (recorded[3] == 0) == (name in ON_THE_HOST)


def test_graphs_serve_other_generations(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other lengths, end ids and inputs of the same method replay the same graphs, though they hold no such value."""
    first = {"max_new_tokens": 40, "min_new_tokens": 20}
    for _ in range(2):
        generate_with_both_loops(model, monkeypatch, **batch, **first)
    recorded = captures()
    reverse = {each: tensor.flip(0) for each, tensor in batch.items()}
    for options in (
        {"max_new_tokens": 30, "min_new_tokens": 12},
        {"max_new_tokens": 6, "min_new_tokens": 2},
        {"max_new_tokens": 40, "min_new_tokens": 4, "eos_token_id": 20},
        {"max_new_tokens": 40, "suppress_tokens": [5, 6, 7]},
    ):
        expected, found = generate_with_both_loops(model, monkeypatch, **reverse, **options)
        assert torch.equal(found, expected)
    assert captures() == recorded == len(BUCKETS)


def test_methods_have_graphs_of_their_own(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other parameters are other graphs, of which those used last are kept; equal ones share theirs."""
    methods: list[dict[str, Any]] = [{}, {"num_beams": 1, "do_sample": True, "top_k": 0}]
    methods += [{"do_sample": True, "top_k": 9, "temperature": temperature} for temperature in (1.1, 1.2, 1.3)]
    for options in (*methods, {}, methods[-1]):
        expected, found = generate_with_both_loops(model, monkeypatch, **batch, **options, max_new_tokens=7)
        assert torch.equal(found, expected)
    assert captures("the selection") == len(methods) + 1  # the first one was dropped, and began anew
    assert captures() == 1  # the last one recurs
    for options in (methods[2], methods[1], methods[2]):
        model.generate(**batch, **options, max_new_tokens=7)
    assert captures("the selection") == len(methods) + 2  # the second one was dropped, the third was used later
    assert len(graphs(model)) == MAX_TOKEN_GRAPHS
    assert len({graph.selection.method for graph in graphs(model)}) == MAX_TOKEN_GRAPHS


def test_beam_searches_have_graphs_of_their_own(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each length penalty and way of stopping; scores don't take another one's penalties."""
    methods = [{}, {"length_penalty": -3.0}, {"early_stopping": True}, {"num_return_sequences": 3}]
    for options in methods * 2:
        settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 7, **options}
        expected, found = generate_with_both_loops(model, monkeypatch, **batch, **settings)
        assert torch.equal(found, expected)
    assert len(graphs(model)) == captures() == len(methods)


def test_prompts_of_several_tokens(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They don't run in the decode buffers, whose inputs are still those of the generation before."""
    prompts = [torch.tensor([0, second]).repeat(len(TEXTS), 1) for second in (5, 9, 7, 30)]
    with monkeypatch.context() as patch:
        patch.setattr(AcceleratedModel, "_supports", lambda *_: False)
        expected = [model.generate(**batch, decoder_input_ids=prompt, max_new_tokens=6) for prompt in prompts]
    found = [model.generate(**batch, decoder_input_ids=prompt, max_new_tokens=6) for prompt in prompts]
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
    assert captures() == 1


def test_short_generations_capture_nothing(model: AcceleratedModel, batch: dict[str, Tensor]) -> None:
    """Neither do generations with parameters that don't recur; those that recur are captured once."""
    for number in range(1, 9):
        model.generate(**batch, max_new_tokens=5, do_sample=True, temperature=1 + number / 10)
    assert captures() == 0
    seen = []
    for _ in range(5):
        model.generate(**batch, max_new_tokens=2)  # one decode step
        seen.append(captures())
    assert seen == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_static_caches_that_end_midway(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Where no longer static cache fits, the generation goes on with caches that grow, from the ids selected so far."""
    runtime: Any = model.runtime
    end_static_caches(model, monkeypatch, 8)
    refused: list[int] = []
    decode_and_select = runtime.decode_and_select

    def count(inputs: Any, state: Any, selection: Any) -> Any:
        following = decode_and_select(inputs, state, selection)
        refused.extend([state.length] * (following is None))
        return following

    monkeypatch.setattr(runtime, "decode_and_select", count)
    for _ in range(3):
        expected, found = generate_with_both_loops(model, monkeypatch, **batch, **options, max_new_tokens=40)
        assert torch.equal(found, expected)
    assert captures() == 1
    assert refused == [8] * 3  # once in a generation
    assert found.shape[1] > 10


def test_returned_caches(model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation goes on from the caches that another returned, which hold nothing that came after the end."""
    first = {name: value[:1] for name, value in batch.items()}
    options = {"max_new_tokens": 40, "return_dict_in_generate": True}
    expected, found = generate_with_both_loops(model, monkeypatch, **first, **options)
    assert torch.equal(found.sequences, expected.sequences)
    views = [each.past_key_values.self_attention_cache.layers[1].keys for each in (found, expected)]
    torch.testing.assert_close(views[0], views[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [8, 64])
def test_one_latency_a_token(
    model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Tokens are timed one by one, whichever call of the runtime computes them, and one that does nothing isn't."""
    end_static_caches(model, monkeypatch, longest)
    with GenerationTimer(model) as timing:
        model.generate(**batch, max_new_tokens=20, min_new_tokens=20)
    assert len(timing.latencies) == 20
    assert 0 < timing.inside < timing.total


def test_one_call_a_token(model: AcceleratedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Per bucket, the host passes the inputs of one token; it never copies logits or ids."""
    runtime: Any = model.runtime
    written, taken = [], []
    decode_and_select = runtime.decode_and_select

    def count(inputs: Any, state: Any, selection: Any) -> Any:
        def inputs_once() -> Any:
            written.append(state.length)
            return inputs()

        taken.append(state.length)
        return decode_and_select(inputs_once, state, selection)

    monkeypatch.setattr(runtime, "decode_and_select", count)
    monkeypatch.setattr(runtime, "decode", pytest.fail)
    model.generate(**batch, max_new_tokens=20, min_new_tokens=20)
    assert taken == list(range(1, 20))
    assert written == [1, *BUCKETS[:2]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=str)
def test_masks_and_positions(gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Of a decoder-only model: padded prompts, none, and positions given by the caller, across a bucket."""
    replay_token_graphs(monkeypatch)
    model: Any = gpt2.static
    model.runtime.spare_buffers.clear()
    without_mask = {"input_ids": gpt2.ids(2, 7)}
    shifted = without_mask | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    shifted["position_ids"] = torch.arange(200, 207).repeat(2, 1)
    results, settings = [], {"max_new_tokens": 40, "min_new_tokens": 40, **options}
    for inputs in (gpt2.inputs(3), without_mask, shifted, without_mask):
        expected, found = generate_with_both_loops(model, monkeypatch, **inputs, **settings)
        assert torch.equal(found, expected)
        results.append(found[:, -40:].tolist())
    assert captures() > 0
    assert results[1] == results[3]
    assert results[1] != results[2] or not options  # random weights repeat their best token
    model.runtime.spare_buffers.clear()


class LastRow:
    """Selection that takes the largest logit, and lets all rows continue the last one."""

    def __init__(self, next_ids: Tensor) -> None:
        self.next_ids, self.parents = next_ids, torch.tensor([1, 1])

    def copy_from(self, other: "LastRow") -> None:
        assert other is self

    def select(self, logits: Tensor) -> None:
        self.next_ids.copy_(logits[:, -1].argmax(-1, keepdim=True))


@pytest.mark.parametrize("position", [torch.tensor([3, 3]), torch.tensor(3)], ids=["a row", "all rows"])
def test_order_of_a_token(position: Tensor) -> None:
    """Caches are reordered, the mask shows the token, the step runs, its ids are selected; then the inputs advance."""
    inputs = {IDS: torch.tensor([[7], [8]]), POSITION: position.clone(), POSITION_IDS: torch.tensor([[1], [3]])}
    inputs[MASK] = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    logits, seen = torch.zeros(2, 1, 5), list[Any]()

    def step() -> None:
        seen.append({name: tensor.tolist() for name, tensor in inputs.items()})
        logits.zero_()
        logits[0, 0, 4] = logits[1, 0, 2] = 1

    def reorder(index: Tensor, length: Tensor) -> None:
        seen.append((index.tolist(), length.tolist()))

    selection: Any = LastRow(inputs[IDS])
    graph = TokenGraph(step, step, inputs, logits, reorder, selection, "of a test")
    for _ in range(2):
        graph.begin(selection)  # two graphs at first, then one
        graph()
    first, second = seen[1], seen[3]
    assert (seen[0], seen[2]) == (([1, 1], [3]), ([1, 1], [4]))
    assert first[IDS] == [[7], [8]]
    assert first[MASK] == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert first[POSITION_IDS] == [[1], [3]]
    assert second[IDS] == [[4], [2]]
    assert second[MASK] == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert second[POSITION_IDS] == [[2], [4]]
    assert torch.equal(inputs[POSITION], position + 2)


def test_the_stand_in_is_sensitive() -> None:
    """It replays a value of the host as it was, and refuses an operation that waits for the device."""
    total, number = torch.zeros(1), [1]
    replayed = ReplayedCallable(lambda: total.add_(torch.ones(1) * number[0]), torch.device("cpu"), "a sum")
    for number[0] in (1, 10, 100):
        replayed()
    assert total.tolist() == [21.0]  # a CUDA graph's, too: 1, 10, and 10 again
    for synchronizing in (lambda: total.item(), lambda: total.nonzero(), lambda: bool(total)):
        with pytest.raises(RuntimeError, match="waits for the device"), Recorder():
            synchronizing()


def test_on_the_cpu_tokens_are_not_captured(opened: AcceleratedModel, batch: dict[str, Tensor]) -> None:
    """The same operations run, uncaptured."""
    runtime: Any = opened.runtime
    runtime.spare_buffers.clear()
    opened.generate(**batch, max_new_tokens=9)
    assert graphs(opened)
    assert all(type(graph.token) is CudaGraphCallable and not graph.token.captured for graph in graphs(opened))
