"""Rows of tables are copied as torch indexes them.

On a machine without a GPU a C++ compiler builds the kernel's source, and a loop takes the place of its threads.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.engine.kernel.lookups import FIELDS, KERNEL, Lookup, Lookups, record
from tests.engine.kernel.nvrtc import compile_for

HOST = """
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim;
struct uint4 { int x, y, z, w; };
#define __global__
"""
LAUNCH = """
extern "C" void launch(int rows, int count, const Record* records) {
    blockDim = {32, 1};
    for (blockIdx.y = 0; blockIdx.y < count; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < rows; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x) look_up(records);
}
"""
ROWS = 3


def lookups(device: str = "cpu") -> list[Lookup]:
    """Return lookups of rows of a multiple of 16 bytes and of 6, 130 and 21 bytes, by two inputs."""
    generator = torch.Generator().manual_seed(2)
    position = torch.tensor([4, 0, 6]).to(device)
    ids = torch.tensor([[1], [-1], [2]]).to(device)
    tables = [
        (torch.randn(7, 2, 40, generator=generator), position),
        (torch.randn(7, 1, 3, generator=generator).half(), ids),
        (torch.randn(9, 65, generator=generator).bfloat16(), ids),
        (torch.rand(7, 21, generator=generator) > 0.5, position),
    ]
    found = []
    for values, index in tables:
        table = values.to(device)
        found.append(Lookup(table, index, torch.zeros_like(table[index.flatten()])))
    return found


def check(made: list[Lookup]) -> None:
    for each in made:
        assert torch.equal(each.value, each.table[each.index.flatten()])
        assert len(set(map(str, each.value.tolist()))) == ROWS  # rows differ, so that a wrong one shows


def test_on_the_host(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path / "lookups.cpp"
    path.write_text(f"{HOST}\n{KERNEL}\n{LAUNCH}")
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-w", path, "-o", path.with_suffix(".so")], check=True)
    made = lookups()
    records = torch.tensor([record(each) for each in made])
    assert records.shape == (4, FIELDS)
    ctypes.CDLL(str(path.with_suffix(".so"))).launch(ROWS, len(made), ctypes.c_void_p(records.data_ptr()))
    check(made)


def test_in_torch() -> None:
    made = lookups()
    Lookups(made, torch.device("cpu"))()
    check(made)


def test_a_value_of_another_width_is_refused() -> None:
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"a table \[4, 3\] has no rows for a value \[2, 2\]"):
        record(Lookup(torch.zeros(4, 3), index, torch.zeros(2, 2)))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_compiles(architecture: str) -> None:
    assert compile_for(KERNEL, architecture).spilled == 0


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    made = lookups("cuda")
    call, graph = Lookups(made, torch.device("cuda")), torch.cuda.CUDAGraph()
    call()
    check(made)
    with torch.cuda.graph(graph):
        call()
    index: Tensor = made[0].index
    index.copy_(torch.tensor([5, 2, 1]))
    graph.replay()
    check(made)
