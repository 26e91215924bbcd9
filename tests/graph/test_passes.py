"""The registry of graph passes, and what the base class promises."""

import re

import onnx_ir as ir
import pytest
from onnx_ir.passes import PassResult

from accel.graph import registry
from accel.graph.passes import GraphPass, run_pass
from tests.graph.text import parse

EVERY = {**registry.OPTIMIZE, **registry.DECODE}


@pytest.mark.parametrize("name", EVERY)
def test_a_pass_is_named_after_its_class_and_described_in_one_line(name: str) -> None:
    """`optimize` prints the description in a column of its table."""
    graph_pass = EVERY[name]
    assert re.sub(r"(?<!^)(?=[A-Z])", "_", graph_pass.__name__).lower() == name == graph_pass.name
    assert 0 < len(graph_pass.description) <= 60
    assert "\n" not in graph_pass.description
    assert graph_pass.description[0].isupper()
    assert not graph_pass.description.endswith(".")


def test_no_pass_is_registered_twice() -> None:
    """A name means one pass, whichever option it is a key of."""
    assert not registry.OPTIMIZE.keys() & registry.DECODE.keys()


def test_every_model_is_seen_before_the_first_changes_and_all_are_rewritten() -> None:
    """Also where the first model has reported a change already."""
    events: list[str] = []

    class Recorder(GraphPass):
        name, description = "recorder", "Record the calls"

        def prepare(self, models: list[ir.Model]) -> None:  # type: ignore[override]
            events.extend(f"see {model.graph.name}" for model in models)

        def call(self, model: ir.Model) -> PassResult:
            events.append(f"rewrite {model.graph.name}")
            return PassResult(model, modified=model.graph.name == "a")

    models = [parse(f"{name} (float[n] x) => (float[n] y) {{ y = Neg(x) }}") for name in "ab"]
    assert run_pass(Recorder(), models)
    assert events == ["see a", "see b", "rewrite a", "rewrite b"]
    assert not run_pass(Recorder(), models[1:])
