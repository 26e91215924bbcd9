"""The kernel of greedy search does what torch does, with ties, NaN, infinities and sequences that have ended.

On a machine without a GPU a C++ compiler builds its source, with a thread for each of its threads.
"""

import ctypes
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.engine.operations.choice import FORBID, Choice, Filter
from accel.models.decoding.sampling import Sampler
from accel.runtime import greedy_kernel as module
from accel.runtime.greedy_kernel import WORDS, arguments, greedy_kernel, source
from tests.engine.kernel.nvrtc import compile_for

THREADS = 32  # of a block, where each is a thread of the host
HOST = """
#include <barrier>
#include <thread>
#include <vector>
struct Index { int x, y; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static std::barrier<> everyone(THREADS);
#define __device__
#define __global__
#define __shared__ static
#define __syncthreads() everyone.arrive_and_wait()
#define __threadfence()
static unsigned int atomicAdd(unsigned int* at, unsigned int value) { *at += value; return *at - value; }
static void atomicMax(unsigned long long* at, unsigned long long value) { *at = value > *at ? value : *at; }
"""
LAUNCH = """
template <typename... A> static void run(int blocks, int rows, A... a) {
    gridDim = {blocks, rows};
    for (int block = 0; block < blocks * rows; ++block) {
        std::vector<std::thread> threads;
        for (int thread = 0; thread < THREADS; ++thread)
            threads.emplace_back([=] {
                threadIdx.x = thread;
                blockIdx = {block % blocks, block / blocks};
                choose(a...);
            });
        for (auto& each : threads) each.join();
    }
}
extern "C" void launch(int blocks, int rows, const Bits* logits, long long stride, int vocabulary,
                       const long long* allowed_from, const long long* ends, int end_count, const long long* padding,
                       bool* ended, bool* finished, long long* next_ids, long long* new_ids, long long capacity,
                       long long* selected, unsigned int* arrived, u64* best) {
    run(blocks, rows, logits, stride, vocabulary, allowed_from, ends, end_count, padding, ended, finished, next_ids,
        new_ids, capacity, selected, arrived, best);
}
"""
ROWS, VOCABULARY, TOKENS = 5, 103, 9
ENDS = [3, 40]
ALLOWED_FROM = {3: 6, 40: 4, 20: 100, 0: 100}  # some ids, the first one and that of a tie among them
CASES = pytest.mark.parametrize(
    ("ends", "forbids"), [(ENDS, False), ([], False), (ENDS, True)], ids=["ends", "no end", "forbidden ids"]
)


def logits_of(token: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return logits [rows, 2, vocabulary] of a step, some of which are equal, infinite, NaN or a zero with a sign."""
    values = torch.randn(ROWS, 2, VOCABULARY, generator=generator)
    values[1, 1, [70, 20, 50]] = 9.0  # a tie: the first
    values[2, 1] = -torch.inf
    if token == 2:
        values[3, 1, ENDS[0]] = 20.0
    if token == 4:
        values[0, 1, [60, 80]] = torch.nan
        values[0, 1, 10] = torch.inf
    if token == 5:
        values[3, 1] = -1.0
        values[3, 1, 90], values[3, 1, 91] = -0.0, 0.0
    if token == 6:
        values[[1, 4], 1, ENDS[token % 2]] = 20.0
    if token == 7:
        values[[0, 2, 3], 1, ENDS[0]] = 30.0
    return values.to(dtype)


def search(ends: list[int], forbids: bool, device: str = "cpu") -> Sampler:
    """Return a greedy search without tokens."""
    allowed_from = torch.zeros(1, VOCABULARY, dtype=torch.int64)
    for id, count in ALLOWED_FROM.items():
        allowed_from[0, id] = count
    tensors: dict[str, Tensor] = {
        "allowed_from": allowed_from if forbids else allowed_from[:0],
        "ends": torch.tensor(ends, dtype=torch.int64),
        "padding": torch.tensor(7),
        "next_ids": torch.empty(ROWS, 1, dtype=torch.int64),
        "selected": torch.zeros(1, dtype=torch.int64),
        "finished": torch.zeros((), dtype=torch.bool),
        "new_ids": torch.zeros(ROWS, TOKENS + 2, dtype=torch.int64),
        "ended": torch.zeros(ROWS, 1, dtype=torch.bool),
        "arrived": torch.zeros(1, dtype=torch.int32),
        "best": torch.zeros(ROWS, dtype=torch.int64),
    }
    choice = Choice((Filter(FORBID),) if forbids else (), ends=len(ends))
    return Sampler(choice=choice, **{name: tensor.to(device) for name, tensor in tensors.items()})


def state(found: Sampler) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in found._tensors().items()}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that runs the kernel for a dtype on the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")

    def launch_for(dtype: torch.dtype) -> Any:
        path = folder / f"{str(dtype).split('.')[1]}.cpp"
        macros, _, code = source(dtype, THREADS).partition("\n\n")
        path.write_text(f"{macros}\n{HOST}\n{code}\n{LAUNCH}")
        library = path.with_suffix(".so")
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", str(path), "-o", str(library)]
        subprocess.run(command, check=True)
        launch = ctypes.CDLL(str(library)).launch
        pointer, long, integer = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
        launch.argtypes = [
            integer, integer, pointer, long, integer, pointer, pointer, integer, *[pointer] * 5, long, *[pointer] * 3,
        ]  # fmt: skip
        launch.restype = None
        return lambda blocks, logits, found: launch(
            blocks,
            len(logits),
            *[int(value) for value in arguments(logits, found)],  # type: ignore[call-overload]
        )

    return launch_for


@CASES
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_same_as_torch_on_the_host(host: Any, dtype: torch.dtype, blocks: int, ends: list[int], forbids: bool) -> None:
    launch, generator = host(dtype), torch.Generator().manual_seed(3)
    expected, found = search(ends, forbids), search(ends, forbids)
    for token in range(TOKENS):
        logits = logits_of(token, dtype, generator)
        expected.select(logits)
        launch(blocks, logits[:, -1], found)
        assert state(found) == state(expected), token
    assert bool(expected.finished) == bool(ends)
    assert len({tuple(row) for row in expected.new_ids.tolist()}) == ROWS


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_compiles(architecture: str, dtype: torch.dtype) -> None:
    assert compile_for(source(dtype), architecture).spilled == 0


def test_no_kernel_on_the_cpu() -> None:
    assert greedy_kernel(torch.device("cpu"), torch.float16) is None


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_same_as_torch_on_a_gpu(
    dtype: torch.dtype, blocks: int, ends: list[int], forbids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "blocks", lambda vocabulary: blocks)
    generator = torch.Generator().manual_seed(3)
    expected, found = search(ends, forbids), search(ends, forbids, "cuda")
    assert greedy_kernel(found.next_ids.device, dtype) is not None
    for token in range(TOKENS):
        logits = logits_of(token, dtype, generator)
        expected.select(logits)
        found.select(logits.cuda())
        assert state(found) == state(expected), token
