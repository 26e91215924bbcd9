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

THREADS = 256
IDS_PER_THREAD = 4  # at least, so that a small vocabulary has few blocks
MAX_BLOCKS = 64  # of a row
WORDS = {  # dtype of logits -> C type of their bits, and the bits of infinity
    torch.float16: ("unsigned short", 0x7C00),
    torch.bfloat16: ("unsigned short", 0x7F80),
    torch.float32: ("unsigned int", 0x7F800000),
}

# Several blocks take the best id of a row, and the last of all blocks ends the token. As in torch, the first of several
# best ids counts, and NaN is better than any number. Bits are mapped to integers of the same order, followed by the
# complement of the id: the largest is the best. An id that is not allowed before a number of ids was chosen has minus
# infinity until then.
KERNEL = r"""
typedef unsigned long long u64;

// Returns a number that is larger for a larger logit, and for equal logits for a smaller id; never 0.
__device__ u64 ranked(Bits bits, int id) {
    const Bits sign = (Bits)1 << (sizeof(Bits) * 8 - 1), magnitude = bits & (Bits)~sign;
    Bits order = bits & sign ? (Bits)~bits : (Bits)(bits | sign);
    if (magnitude == 0) order = sign;                  // -0 equals 0
    if (magnitude > INFINITE) order = (Bits)~(Bits)0;  // NaN
    return (u64)order << 32 | (unsigned)~id;
}

// Returns the largest number that the threads of the block pass. All of them get it.
__device__ u64 largest(u64 mine) {
    __shared__ u64 numbers[THREADS];
    __syncthreads();
    numbers[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half && numbers[threadIdx.x + half] > numbers[threadIdx.x])
            numbers[threadIdx.x] = numbers[threadIdx.x + half];
    }
    __syncthreads();
    return numbers[0];
}

extern "C" __global__ void choose(const Bits* logits, long long stride, int vocabulary,
                                  const long long* allowed_from, const long long* ends, int end_count,
                                  const long long* padding, bool* ended, bool* finished, long long* next_ids,
                                  long long* new_ids, long long capacity, long long* selected, unsigned int* arrived,
                                  u64* best) {
    __shared__ bool is_last;
    const int thread = threadIdx.x, rows = gridDim.y;
    const Bits* scores = logits + blockIdx.y * stride;
    const Bits least = (Bits)((Bits)1 << (sizeof(Bits) * 8 - 1) | INFINITE);
    const long long count = *selected;
    u64 mine = 0;
    #pragma unroll 4
    for (int id = blockIdx.x * THREADS + thread; id < vocabulary; id += gridDim.x * THREADS) {
        const bool allowed = allowed_from == nullptr || allowed_from[id] <= count;
        const u64 rank = ranked(allowed ? scores[id] : least, id);
        mine = rank > mine ? rank : mine;
    }
    mine = largest(mine);
    if (thread == 0) {
        atomicMax(best + blockIdx.y, mine);
        __threadfence();
        is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x * rows;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    u64 going_on = 0;  // 1 if a row has not ended
    for (int row = thread; row < rows; row += THREADS) {
        long long id = (unsigned)~(unsigned)((volatile u64*)best)[row];
        best[row] = 0;
        if (end_count > 0) {
            bool over = ended[row];
            if (over) id = *padding;
            for (int i = 0; i < end_count; ++i) over |= id == ends[i];
            ended[row] = over;
            going_on |= !over;
        }
        next_ids[row] = id;
        if (count < capacity) new_ids[row * capacity + count] = id;
    }
    going_on = largest(going_on);
    if (thread != 0) return;
    if (end_count > 0) *finished = going_on == 0;
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
        arrived: Blocks that have taken the best of their ids, int32 [1]; 0 between two tokens.
        best: The best logit and id that they found in each row, as the kernel ranks them, int64 [rows]; 0 likewise.
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
    best: Tensor


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
            kernel((blocks(logits.shape[1]), len(logits)), (THREADS,), arguments(logits, search))

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
        pointers["best"],
    )


def blocks(vocabulary: int) -> int:
    """Return the number of blocks for a row of logits."""
    return min(-(-vocabulary // (THREADS * IDS_PER_THREAD)), MAX_BLOCKS)
