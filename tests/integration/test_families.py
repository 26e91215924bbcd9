"""Every family runs end to end, and no feature of `generate` is lost."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock
from transformers import GenerationMixin

from accel import testing
from accel.models.decoding.loops import PREPARE_INPUTS
from accel.runtime.layout import first_variant
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """The tiny model of one family, exported once."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{request.param}.lock"),
        testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts) as subject,
    ):
        yield subject


FAST = {"gpt2", "whisper"}  # decoder-only and speech; the T5s of other tests are the encoder-decoders


def family(name: str) -> Any:
    """Return the parameter of one family: its checks run in one worker, and only those of `FAST` in the fast tier."""
    marks = [pytest.mark.xdist_group(name)]
    return pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
@pytest.mark.parametrize(
    "subject",
    [family(name) for name in FAMILIES],
    indirect=True,
    scope="module",
)
def test_conformance(check: testing.Check, subject: testing.Subject) -> None:
    assert subject.static is not None, "no static decode graph"
    check(subject)


@pytest.mark.parametrize("subject", [family("llama")], indirect=True)
def test_nodes_of_a_static_decode_graph(subject: testing.Subject) -> None:
    """Each rotary embedding is one node, keys and values are not repeated, and one token needs no transposes."""
    graph = onnx.load(first_variant(subject.artifacts["verify"].folder).static_decode, load_external_data=False).graph
    operators, layers = Counter(node.op_type for node in graph.node), subject.eager.config.num_hidden_layers
    assert operators["RotaryEmbedding"] == 2 * layers
    assert operators["TensorScatter"] == 2 * layers
    assert operators["Neg"] == 0
    assert operators["Transpose"] <= layers + 1  # of keys, and of the logits
    masks = [node for node in graph.node if node.op_type == "Expand" and "past_key_values" in "".join(node.input)]
    assert not masks


@pytest.mark.parametrize("subject", [family("phi3-longrope")], indirect=True)
def test_positions_that_are_rescaled_during_generation(
    subject: testing.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From position 64 on, this model rotates all keys differently, so its class and accel drop the caches there."""
    inputs = {"input_ids": subject.ids(2, 60)}
    subject.assert_same_tokens(**inputs)
    model_class = type(subject.model)
    monkeypatch.setattr(model_class, PREPARE_INPUTS, vars(GenerationMixin)[PREPARE_INPUTS])
    with pytest.raises(AssertionError):
        subject.assert_same_tokens(**inputs)
