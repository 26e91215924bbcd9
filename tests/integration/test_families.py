"""Every family takes the whole road, and `generate` loses nothing on it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from filelock import FileLock
from transformers import GenerationMixin

from accel import testing
from accel.models.generation import PREPARE_INPUTS
from accel.runtime.layout import STATIC_DECODE
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """The tiny model of one family, exported once."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{request.param}.lock"),
        testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts) as made,
    ):
        yield made


@pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
@pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES],
    indirect=True,
    scope="module",
)
def test_conformance(check: testing.Check, subject: testing.Subject) -> None:
    assert subject.static is not None, "no static step"
    check(subject)


@pytest.mark.parametrize("subject", [pytest.param("llama", marks=pytest.mark.xdist_group("llama"))], indirect=True)
def test_nodes_of_a_static_step(subject: testing.Subject) -> None:
    """Each rotation is one node, keys and values are not repeated, and nothing is turned around one token."""
    graph = onnx.load(subject.artifacts["verify"].folder / STATIC_DECODE, load_external_data=False).graph
    found, layers = Counter(node.op_type for node in graph.node), subject.eager.config.num_hidden_layers
    assert found["RotaryEmbedding"] == 2 * layers
    assert found["TensorScatter"] == 2 * layers
    assert found["Neg"] == 0
    assert found["Transpose"] <= layers + 1  # of keys, and of the logits
    masks = [node for node in graph.node if node.op_type == "Expand" and "past_key_values" in "".join(node.input)]
    assert not masks


@pytest.mark.parametrize(
    "subject", [pytest.param("phi3-longrope", marks=pytest.mark.xdist_group("phi3-longrope"))], indirect=True
)
def test_positions_that_are_rescaled_on_the_way(subject: testing.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """From position 64 on, this model turns all keys otherwise: its class drops the caches there, and so do we."""
    given = {"input_ids": subject.ids(2, 60)}
    subject.assert_same_tokens(**given)
    kind = type(subject.model)
    monkeypatch.setattr(kind, PREPARE_INPUTS, vars(GenerationMixin)[PREPARE_INPUTS])
    with pytest.raises(AssertionError):
        subject.assert_same_tokens(**given)
