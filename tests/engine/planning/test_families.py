"""The plan of every family: its logits and caches against ONNX Runtime's, and how much of it is fused."""

from pathlib import Path

import pytest
import torch

from accel.engine.executor import Executor
from accel.engine.nodes import graph_inputs, read_graph
from accel.engine.planning.planner import Plan, plan
from accel.graph import files
from accel.graph.precision.emulate import emulate_half
from accel.runtime.layout import KEPT
from accel.runtime.session import HostSession, SessionSettings
from accel.runtime.weights import SharedWeights
from tests.engine.planning import coverage
from tests.engine.test_families import CPU, FP16, POSITIONS, Make, Steps, families, make
from tests.families import FAMILIES

__all__ = ["make"]  # the fixture
EXPERTS = "mixtral"  # which weights a token is multiplied with depends on data


def plan_of(path: Path) -> Plan:
    """Return the plan of a static decode graph."""
    graph = read_graph(path, SharedWeights(CPU).tensors(path))
    fixed = {KEPT: torch.tensor([0])} if KEPT in graph.inputs else {}
    return plan(graph, graph_inputs(path), "batch_size", fixed)


def difference(found: Plan, path: Path, reference: Path, dtype: torch.dtype) -> float:
    """Run several steps of a padded batch by a plan and by ONNX Runtime.

    Args:
        found: The plan.
        path: Its graph.
        reference: Graph for ONNX Runtime that computes the same.
        dtype: Dtype to hand ONNX Runtime's caches back in.

    Returns:
        The largest difference of an output, divided by that output's largest magnitude.
    """
    session, executor = HostSession(reference, SessionSettings()), Executor(found.graph, CPU)
    ours, theirs = Steps(path), Steps(path)
    bound = {output: ours.inputs[name] for name, output in ours.cache.items()}
    assert len(bound) == 4, "two layers have four caches that a step writes"
    largest = 0.0
    for position in POSITIONS:
        ours.advance(position)
        theirs.advance(position)
        outputs, expected = executor.run(ours.inputs, bound), session(theirs.inputs)
        assert set(outputs) == set(expected)
        for name, value in expected.items():
            error = (outputs[name].float() - value.float()).abs().max() / value.float().abs().max()
            largest = max(largest, float(error))
        for name, output in theirs.cache.items():
            assert outputs[output] is ours.inputs[name]
            theirs.inputs[name] = expected[output].to(dtype)
    return largest


@families(*FAMILIES)
def test_fp32(make: Make, request: pytest.FixtureRequest) -> None:
    """The same up to rounding; nearly all is fused; and docs/engine.md says how much."""
    path, family = make("precision=fp32").static_decode, request.node.callspec.params["make"]
    found = plan_of(path)
    assert difference(found, path, path, torch.float32) < 1e-5
    if family != EXPERTS:
        assert found.coverage()["fused_share"] >= 0.9
        assert found.coverage()["torch_softmaxes"] == 0
    coverage.check(family, found)


@families(*FAMILIES)
def test_fp16(make: Make, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The same up to rounding in FP16, and no less of it fused."""
    path = make(*FP16).static_decode
    model = files.load(path)
    emulate_half(model)
    files.save(model, tmp_path / path.name)
    found = plan_of(path)
    assert difference(found, path, tmp_path / path.name, torch.float16) < 1e-2
    if request.node.callspec.params["make"] != EXPERTS:
        assert found.coverage()["fused_share"] >= 0.9
        assert found.coverage()["torch_softmaxes"] == 0


def test_every_family_is_documented() -> None:
    assert list(coverage.documented()) == list(FAMILIES)
