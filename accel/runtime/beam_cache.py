"""Beams over caches that stay where they are: of what a row is to hold, only what it doesn't hold yet is copied.

The beams of one input soon have nearly all of their past in common, whichever of them computed it. So a reordering that
looks at who computed what moves a few tokens, where one that copies rows moves whole caches.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Stack = tuple[Tensor, int]
"""Caches of one shape, [caches, rows, ...], and the axis of their tokens."""

Mover = Callable[[Tensor, Tensor, Tensor, int], None]
"""(caches [caches, rows, heads, bucket, width], index [rows], rows and tokens that change [rows, bucket], length)."""

logger = logging.getLogger(__name__)

THREADS = 256
UNITS = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}  # by bytes

# A block has one head of one cache. Its threads first look which of THREADS tokens change in any row; then each moves a
# unit of a token's numbers: it reads that of all rows before it writes any, so rows may trade places.
KERNEL = r"""
template <typename Unit, int ROWS>
__global__ void move_rows(Unit* caches, const long long* index, const bool* changes,
                          int heads, int bucket, int units, int length) {
    const size_t row = (size_t)heads * bucket * units;
    Unit* head = caches + (blockIdx.x / heads) * ROWS * row + (size_t)(blockIdx.x % heads) * bucket * units;
    for (int start = 0; start < length; start += blockDim.x) {
        const int looked = start + threadIdx.x;
        bool any = false;
        if (looked < length)
            for (int i = 0; i < ROWS; ++i) any |= changes[i * bucket + looked];
        if (!__syncthreads_or(any)) continue;
        const int end = min(start + (int)blockDim.x, length) * units;
        for (int at = start * units + threadIdx.x; at < end; at += blockDim.x) {
            const int token = at / units;
            Unit held[ROWS];
            bool moved = false;
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) moved |= changes[i * bucket + token];
            if (!moved) continue;
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) held[i] = head[index[i] * row + at];
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) if (changes[i * bucket + token]) head[i * row + at] = held[i];
        }
    }
}
"""


class BeamAncestry:
    """For each row and token of caches, the row that computed it. Two rows with the same one hold the same there."""

    def __init__(self, rows: int, bucket: int, device: torch.device) -> None:
        self._own = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self._computed_by = self._own.repeat(1, bucket)
        self._move = mover(device)

    def begin(self, start: int) -> None:
        """From token `start` on, every row holds, or will hold, what it computed itself."""
        self._computed_by[:, start:] = self._own

    def take(self, other: "BeamAncestry", length: int) -> None:
        """The same rows hold the same first `length` tokens, copied into caches with other room."""
        self._computed_by[:, :length] = other._computed_by[:, :length]

    def reorder(self, index: Tensor, length: int, stacks: Sequence[Stack]) -> None:
        """Let row i of all `stacks` hold the first `length` tokens of what was row `index[i]`. In place."""
        index = index.long()  # transformers' beam search counts in 32 bits
        wanted = self._computed_by.index_select(0, index)
        changes = wanted != self._computed_by
        for stack, axis in stacks:
            caches, rows, bucket = len(stack), stack.shape[1], stack.shape[axis]
            self._move(stack.view(caches, rows, stack.shape[2:axis].numel(), bucket, -1), index, changes, length)
        self._computed_by[:, :length] = wanted[:, :length]


@cache
def mover(device: torch.device) -> Mover:
    """What moves rows on `device`: on CUDA a kernel, where CuPy can compile one."""
    if device.type != "cuda":
        return move_on_the_host
    if find_spec("cupy") is not None:
        try:
            compiled(2, 2)
        except Exception as error:  # CuPy's classes for what it misses (a library, a header) have no other in common
            logger.warning(f"beams are copied whole: CuPy compiles no kernel: {str(error).splitlines()[0]}")
        else:
            return move_on_cuda
    return move_all


def move_on_the_host(caches: Tensor, index: Tensor, changes: Tensor, length: int) -> None:
    changed = changes[:, :length].any(0).nonzero()
    if len(changed):
        move_all(caches, index, changes, length, int(changed[0]))


def move_all(caches: Tensor, index: Tensor, changes: Tensor, length: int, start: int = 0) -> None:
    """All from token `start` on, one cache after the other, by way of a copy of that one."""
    for one in caches:
        part = one[:, :, start:length]
        part.copy_(part.index_select(0, index))


def move_on_cuda(caches: Tensor, index: Tensor, changes: Tensor, length: int) -> None:
    from numpy import int32

    count, rows, heads, bucket, width = caches.shape
    taken = width * caches.element_size()
    unit = next(size for size in UNITS if taken % size == 0)
    pointers = [int(tensor.data_ptr()) for tensor in (caches, index, changes)]
    numbers = [int32(number) for number in (heads, bucket, taken // unit, length)]
    with seen_by_cupy(torch.cuda.current_stream(caches.device)):
        compiled(rows, unit)((count * heads,), (THREADS,), (*pointers, *numbers))


@cache
def seen_by_cupy(stream: torch.cuda.Stream) -> Any:
    """A stream of torch's as one of CuPy's, which from version 14 on takes it as it is."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)


@cache
def compiled(rows: int, unit: int) -> Callable[..., None]:
    """The kernel for so many rows and units of so many bytes. https://docs.cupy.dev/en/stable/user_guide/kernel.html"""
    import cupy

    name = f"move_rows<{UNITS[unit]}, {rows}>"
    module = cupy.RawModule(code=KERNEL, options=("-std=c++17",), name_expressions=(name,))
    kernel: Callable[..., None] = module.get_function(name)
    return kernel
