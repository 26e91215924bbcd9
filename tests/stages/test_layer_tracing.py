"""Tracing of the first layers alone: which layers, how the graph is completed, and when it isn't done."""

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from accel import testing
from accel.adapters import registry
from accel.adapters.types import Component
from accel.graph import files
from accel.graph.repeat_layers import Stack
from accel.models.checkpoints import load_model
from accel.stages.export import Shortcuts, Tracer
from accel.stages.layer_tracing import find_stack
from tests.conftest import Build
from tests.families import FAMILIES

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
KINDS = ["sliding_attention", "full_attention"]


def deep(values: dict[str, Any], layers: int = 7) -> dict[str, Any]:
    """The configuration with another number of layers in each of its stacks."""
    changed = {name: deep(value, layers) if isinstance(value, dict) else value for name, value in values.items()}
    changed |= dict.fromkeys(LAYERS & changed.keys(), layers)
    if "layer_types" in changed:
        changed["layer_types"] = [KINDS[layer % 2] for layer in range(layers)]
    return changed


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "gemma2", "falcon", "bart"))]
)
def test_completed_graphs_compute_what_torch_does(
    family: str, build: Build, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every layer has its own weights and caches, in order."""
    caplog.set_level(logging.INFO, "accel")
    testing.random_model(deep(FAMILIES[family])).save_pretrained(tmp_path)
    _, artifacts = build(tmp_path, "export")
    assert not [record.getMessage() for record in caplog.records if "all layers" in record.getMessage()]
    traced = dict.fromkeys(artifacts["export"].summary["nodes"], "5 of 7" if family == "gemma2" else "3 of 7")
    del traced["prefill"]  # derived from decode
    assert artifacts["export"].summary["layers_traced"] == traced
    assert len(list(artifacts["export"].folder.glob("*.onnx"))) == 2 + (family in ("t5", "bart"))


@pytest.mark.slow
def test_names_and_order(tmp_path: Any, build: Build) -> None:
    """Inputs, outputs and weights are those of a trace of all layers, and so are the operators."""
    testing.random_model(deep(FAMILIES["qwen2"], 5)).save_pretrained(tmp_path)
    config, _ = build(tmp_path, "export")
    architecture, model = registry.build(config.architecture), load_model(tmp_path)
    described = []
    for shortens in (True, False):
        tracer = Tracer(config, architecture, model, tmp_path, Shortcuts(shortens=shortens))
        tracer.trace(Component.DECODE)
        assert list(tracer.shortened) == ([Component.DECODE] if shortens else [])
        graph = files.load(tmp_path / f"{Component.DECODE}.onnx").graph
        values = (graph.inputs, graph.outputs, graph.initializers.values())
        described.append([[(value.name, str(value.type), str(value.shape)) for value in each] for each in values])
        described[-1][2].sort()
        operators = Counter(node.op_type for node in graph if node.op_type != "Constant")  # copies share constants
        described[-1].append([(name, str(count), "") for name, count in sorted(operators.items())])
    assert described[0] == described[1]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.inner:
            x = inner(x)
        return x


class Stacked(nn.Module):
    """A stack that is used, and one that isn't."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(total))
        self.unused = nn.ModuleList(Layer() for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("total", "layer_types", "traced", "period"),
    [
        (7, None, 3, 1),
        (4, None, 3, 1),
        (3, None, None, None),
        (26, [KINDS[layer % 2] for layer in range(26)], 6, 2),
        (9, [KINDS[layer % 2] for layer in range(9)], 5, 2),
        (26, [KINDS[layer % 6 == 5] for layer in range(26)], 14, 6),
        (8, ["a", "b", "b", "b", "b", "b", "b", "b"], 3, 1),
        (8, list("abcdefgh"), None, None),
        (12, ["b", "a"] * 5, 3, 1),
    ],
)
def test_how_many_layers_are_traced(
    total: int, layer_types: list[str] | None, traced: int | None, period: int | None
) -> None:
    """Those before the first whole block, and two blocks; none are left out of short or irregular stacks."""
    config = PretrainedConfig(kinds=layer_types, other=[1, 2])
    stack = find_stack(Stacked(total), config, {"x": torch.zeros(1, 4)})
    assert stack == (None if traced is None else Stack("layers", traced, period or 0, total))


@pytest.mark.slow
def test_a_damaged_copy_is_noticed(tmp_path: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the completed graph differs from PyTorch, all layers are traced."""
    testing.random_model(deep(FAMILIES["opt"])).save_pretrained(tmp_path)
    shortened: list[bool] = []
    trace_all = Tracer.trace_all

    def damaging(tracer: Tracer) -> None:
        trace_all(tracer)
        shortened.append(bool(tracer.shortened) and tracer.shortcuts.shortens)
        if tracer.shortcuts.shortens:
            graph = files.load(tracer.out / "decode.onnx")
            weights = graph.graph.initializers
            name, other = (f"model.decoder.layers.{layer}.fc2.weight" for layer in (5, 6))
            weights[name].const_value = weights[other].const_value
            files.save(graph, tracer.out / "decode.onnx")

    monkeypatch.setattr(Tracer, "trace_all", damaging)
    build(tmp_path, "export")
    assert shortened == [True, False]
