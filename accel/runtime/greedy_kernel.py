"""Greedy search on a GPU in one launch a token, where torch takes about ten: argmax, ends of sequences, bookkeeping."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from accel.engine.streams import cupy_stream

logger = logging.getLogger(__name__)

THREADS = 1024
WORDS = {  # dtype of logits -> C type of their bits, and the bits of infinity
    torch.float16: ("unsigned short", 0x7C00),
    torch.bfloat16: ("unsigned short", 0x7F80),
    torch.float32: ("unsigned int", 0x7F800000),
}

# One block takes the best id of one row. As in torch, the first of several best ids counts, and NaN is better than any
# number. Bits are mapped to integers of the same order, followed by the complement of the id: the largest is the best.
# An id that is not allowed before a number of ids was chosen has minus infinity until then.
KERNEL = r"""
typedef unsigned long long u64;

// Returns a number that is larger for a larger logit, and for equal logits for a smaller id.
__device__ u64 ranked(Bits bits, int id) {
    const Bits sign = (Bits)1 << (sizeof(Bits) * 8 - 1), magnitude = bits & (Bits)~sign;
    Bits order = bits & sign ? (Bits)~bits : (Bits)(bits | sign);
    if (magnitude == 0) order = sign;                  // -0 equals 0
    if (magnitude > INFINITE) order = (Bits)~(Bits)0;  // NaN
    return (u64)order << 32 | (unsigned)~id;
}

extern "C" __global__ void choose(const Bits* logits, long long stride, int vocabulary,
                                  const long long* allowed_from, const long long* ends, int end_count,
                                  const long long* padding, bool* ended, bool* finished, long long* next_ids,
                                  long long* new_ids, long long capacity, long long* selected, unsigned int* arrived) {
    __shared__ u64 best[THREADS];
    const int row = blockIdx.x, thread = threadIdx.x;
    const Bits* scores = logits + row * stride;
    const Bits least = (Bits)((Bits)1 << (sizeof(Bits) * 8 - 1) | INFINITE);
    const long long count = *selected;
    u64 mine = 0;
    #pragma unroll 8
    for (int id = thread; id < vocabulary; id += THREADS) {
        const bool allowed = allowed_from == nullptr || allowed_from[id] <= count;
        const u64 rank = ranked(allowed ? scores[id] : least, id);
        mine = rank > mine ? rank : mine;
    }
    best[thread] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half && best[thread + half] > best[thread]) best[thread] = best[thread + half];
    }
    if (thread != 0) return;
    long long id = (unsigned)~(unsigned)best[0];
    if (end_count > 0) {
        bool over = ended[row];
        if (over) id = *padding;
        for (int i = 0; i < end_count; ++i) over |= id == ends[i];
        ended[row] = over;
    }
    next_ids[row] = id;
    if (count < capacity) new_ids[row * capacity + count] = id;
    __threadfence();
    if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;  // the last block goes on
    __threadfence();
    if (end_count > 0) {
        bool all = true;
        for (int i = 0; i < gridDim.x; ++i) all &= ((volatile bool*)ended)[i];
        *finished = all;
    }
    *selected = count + 1;
    *arrived = 0;
}
"""


class GreedySearch(Protocol):
    """State of a greedy search, contiguous tensors that are updated in place.

    Attributes:
        allowed_from: Number of ids from which on each id is allowed, int64 [1, vocabulary], or [0, vocabulary].
        ends: Ids that end a sequence, int64 [ends].
        padding: Id after the end of a sequence, int64 [].
        ended: Sequences that have ended, bool [rows, 1]; not updated without `ends`.
        finished: All have ended, bool []; not updated without `ends`.
        next_ids: The ids selected last, int64 [rows, 1].
        new_ids: All selected ids, int64 [rows, capacity].
        selected: Number of ids selected for each sequence, int64 [1].
        arrived: Rows whose id has been selected, int32 [1]; 0 between two tokens.
    """

    allowed_from: Tensor
    ends: Tensor
    padding: Tensor
    ended: Tensor
    finished: Tensor
    next_ids: Tensor
    new_ids: Tensor
    selected: Tensor
    arrived: Tensor


Chooser = Callable[[Tensor, GreedySearch], None]
"""Function of logits [rows, V] that selects the next ids of a search."""


def source(dtype: torch.dtype, threads: int = THREADS) -> str:
    """Return the kernel's source for a dtype of logits."""
    word, infinity = WORDS[dtype]
    return f"#define Bits {word}\n#define INFINITE {infinity}\n#define THREADS {threads}\n{KERNEL}"


@cache
def greedy_kernel(device: torch.device, dtype: torch.dtype) -> Chooser | None:
    """Return the kernel for logits on a device; None where there is none: torch computes the same ids."""
    if device.type != "cuda" or dtype not in WORDS or find_spec("cupy") is None:
        return None
    import cupy

    try:
        with torch.cuda.device(device):
            kernel = cupy.RawModule(code=source(dtype), options=("-std=c++17",)).get_function("choose")
    except Exception as error:  # CuPy's errors for a missing library or header have no common base class
        logger.warning(f"greedy search runs in torch: CuPy can't compile its kernel: {str(error).splitlines()[0]}")
        return None

    def choose(logits: Tensor, search: GreedySearch) -> None:
        with torch.cuda.device(device), cupy_stream(torch.cuda.current_stream(device)):
            kernel((len(logits),), (THREADS,), arguments(logits, search))

    return choose


def arguments(logits: Tensor, search: GreedySearch) -> tuple[object, ...]:
    """Return the kernel's arguments. See `Chooser`; the logits of a row must be adjacent."""
    from numpy import int32, int64

    pointers = {name: int(getattr(search, name).data_ptr()) for name in GreedySearch.__annotations__}
    return (
        int(logits.data_ptr()),
        int64(logits.stride(0)),
        int32(logits.shape[1]),
        pointers["allowed_from"] if len(search.allowed_from) else 0,
        pointers["ends"],
        int32(len(search.ends)),
        pointers["padding"],
        pointers["ended"],
        pointers["finished"],
        pointers["next_ids"],
        pointers["new_ids"],
        int64(search.new_ids.shape[1]),
        pointers["selected"],
        pointers["arrived"],
    )
