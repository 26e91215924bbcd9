"""`export` compares its graphs with PyTorch at shapes other than the traced one, and fails if one is wrong."""

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from accel import testing
from accel.adapters import registry
from accel.adapters.types import Component
from accel.cli.compose import compose
from accel.config.schema import Config, ModelConfig
from accel.errors import AccelError
from accel.evaluation.graph_comparison import compare, run_torch
from accel.graph import files
from accel.graph.decode.cross_caches import Shapes
from accel.graph.repeat_layers import Stack
from accel.models.checkpoints import load_model
from accel.stages import export
from tests.conftest import Build
from tests.families import FAMILIES

COMPONENTS = ("encoder", "prefill", "decode")


@pytest.mark.parametrize("damaged", [None, *COMPONENTS])
def test_every_component_is_compared(build: Build, tiny: Path, tmp_path: Path, damaged: str | None) -> None:
    """A weight that is changed by 1% is detected and its component named; unchanged graphs pass."""
    config, artifacts = build(tiny, "export")
    for component in COMPONENTS:
        graph = files.load(artifacts["export"].folder / f"{component}.onnx")
        if component == damaged:
            norm = next(name for name in graph.graph.initializers if name.endswith("final_layer_norm.weight"))
            changed = graph.graph.initializers[norm].const_value.numpy().copy()
            changed[3] *= 1.01
            graph.graph.initializers[norm].const_value = ir.tensor(changed, name=norm)
        files.save(graph, tmp_path / f"{component}.onnx")
    architecture, load = registry.build(config.architecture), partial(load_model, tiny)
    calls = run_torch(architecture, load(), seed=1)
    if damaged is None:
        worst = compare(architecture, calls, tmp_path, 1e-4, load)
        assert set(worst) == set(COMPONENTS)
        assert all(0 < difference < 1e-4 for difference in worst.values())
    else:
        with pytest.raises(AccelError, match=f"export of {damaged}: .* is off by .*past"):
            compare(architecture, calls, tmp_path, 1e-4, load)


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_shortcuts_are_given_up_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    """First all layers are traced, then prefill by itself; a model that differs even then is an error."""
    caplog.set_level(logging.INFO, "accel")
    testing.random_model(FAMILIES["gpt2"]).save_pretrained(tmp_path)
    written: list[str] = []
    comparisons = iter(range(10))

    def trace(self: export.Tracer, component: Component) -> None:
        written.append(f"{component}, {'first' if self.shortcuts.shortens else 'all'} layers")
        self.nodes[str(component)] = 1
        if self.shortcuts.shortens:
            self.shortened[component] = Stack("", 1, 1, 2)

    def derive_prefill(self: export.Tracer, shapes: Shapes) -> bool:
        written.append("prefill, derived")
        self.nodes["prefill"] = 1
        return True

    def compare(*_: object) -> dict[str, float]:
        if next(comparisons) < failures:
            raise AccelError("it differs")
        return {}

    monkeypatch.setattr(export.Tracer, "trace", trace)
    monkeypatch.setattr(export.Tracer, "derive_prefill", derive_prefill)
    monkeypatch.setattr(export, "compare", compare)
    artifact: Any = SimpleNamespace(folder=tmp_path)
    architecture = registry.build(compose([f"model.checkpoint={tmp_path}", "model=auto"]).architecture)
    run = partial(export.run, Config(model=ModelConfig(name="m")), {"checkpoint": artifact}, architecture, tmp_path)
    if failures == 3:
        with pytest.raises(AccelError, match="it differs"):
            run()
    else:
        summary = run()
        assert summary["layers_traced"] == ({"decode": "1 of 2"} if failures == 0 else {})
    attempts = [
        ["decode, first layers", "prefill, derived"],
        ["decode, all layers", "prefill, derived"],
        ["prefill, all layers", "decode, all layers"],
    ]
    assert written == [step for attempt in attempts[: failures + 1] for step in attempt]
    reasons = ["all layers are traced: with the first ones alone, it differs"]
    reasons += ["prefill is traced: derived from decode, it differs"]
    assert [record.getMessage() for record in caplog.records if "traced:" in record.getMessage()] == reasons[:failures]
