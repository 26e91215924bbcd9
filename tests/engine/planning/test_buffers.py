"""Buffers: values that are needed together never overlap, and the workspace is hardly larger than it must be."""

import random
from itertools import combinations
from pathlib import Path

import pytest

from accel.engine.planning.buffers import ALIGNMENT, Buffer, Workspace, allocate, peak
from tests.engine.one_node import normal
from tests.engine.planning.attention import run
from tests.engine.planning.graphs import planned

LENGTHS = {"B": 4, "S": 9}


def check(workspace: Workspace) -> None:
    """Assert that buffers are aligned, within the workspace, and apart wherever one operation needs both."""
    for buffer in workspace.buffers.values():
        assert buffer.offset % ALIGNMENT == 0
        assert 0 <= buffer.offset <= buffer.offset + buffer.size <= workspace.size
    for first, second in combinations(workspace.buffers.values(), 2):
        if first.is_live_with(second):
            assert first.offset + first.size <= second.offset or second.offset + second.size <= first.offset


@pytest.mark.parametrize("seed", range(20))
def test_random_lifetimes(seed: int) -> None:
    """The sizes of a real model's values, and lives as of a residual stream: most short, some long."""
    generator = random.Random(seed)
    values = {}
    for index in range(200):
        length = generator.choice([1, 1, 1, 2, 3, 20])
        values[f"v{index}"] = (generator.choice([4096, 8192, 16384, 28672, 1000]), index, index + length)
    workspace = allocate(values)
    check(workspace)
    buffers = list(workspace.buffers.values())
    assert [(buffer.size, buffer.first, buffer.last) for buffer in buffers] == list(values.values())
    assert workspace.size <= 1.15 * peak(buffers)


def test_a_chain_takes_two_places() -> None:
    """An operation's output is not where its input is."""
    workspace = allocate({f"v{index}": (1024, index, index + 1) for index in range(10)})
    assert workspace.size == 2048
    assert {buffer.offset for buffer in workspace.buffers.values()} == {0, 1024}


def test_the_smallest_gap_is_taken() -> None:
    values = {
        "a": (4096, 0, 1),
        "b": (2048, 0, 9),
        "c": (1024, 0, 1),
        "d": (768, 0, 9),
        "e": (512, 2, 3),
        "f": (300, 2, 3),
    }
    buffers = allocate(values).buffers
    assert [buffers[name].offset for name in "abcd"] == [0, 4096, 6144, 7168]
    assert buffers["e"] == Buffer(6144, 512, 2, 3)  # between b and d, where c was
    assert buffers["f"] == Buffer(6656, 300, 2, 3)  # behind it


def test_the_peak() -> None:
    assert peak([Buffer(0, 5, 0, 2), Buffer(9, 7, 1, 1), Buffer(9, 6, 2, 2), Buffer(0, 1, 3, 9)]) == 12
    assert peak([]) == allocate({}).size == 0


def test_a_plan(tmp_path: Path) -> None:
    """Inputs, outputs and caches are not in the workspace; all that operations hand each other is."""
    result = run(tmp_path)
    workspace = result.workspace(LENGTHS)
    check(workspace)
    sizes = {name: buffer.size for name, buffer in workspace.buffers.items()}
    assert {name: sizes[name] for name in ("q0", "k0", "v0", "attended", "bias", "cos", "angles")} == {
        "q0": 4 * 32 * 4,
        "k0": 4 * 16 * 4,
        "v0": 4 * 16 * 4,
        "attended": 4 * 32 * 4,
        "bias": 4 * 9 * 4,
        "cos": 4 * 8 * 4,
        "angles": 4 * 8 * 4,
    }
    assert not {"x", "y", "present_key", "present_value", "past_key"} & set(sizes)


def test_lifetimes_of_a_plan(tmp_path: Path) -> None:
    """A value lives from the operation that computes it to the last one that reads it."""
    body = """agraph (float[B,1,16] x) => (float[B,1,16] y)
    { p = MatMul(x, w) a = Relu(p) q = MatMul(a, w) s = Min(q, a) t = Max(s, q) y = Neg(t) }"""
    buffers = planned(body, {"w": normal(16, 16)}, tmp_path).workspace({"B": 2}).buffers
    assert {name: (buffer.first, buffer.last) for name, buffer in buffers.items()} == {
        "a": (0, 2), "q": (1, 3), "s": (2, 3), "t": (3, 4),
    }  # fmt: skip
