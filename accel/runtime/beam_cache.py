"""Beam reordering of static caches, by a table of the rows that computed each token.

A decode step that reads every entry from the row that computed it needs no copies: the table alone is reordered. For
others a reordering copies the tokens whose ancestry changes, where `index_select` over whole rows would copy every
cache. They are few, since after a few steps the beams of one input share nearly all of their past.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from accel.runtime.ring_cache import held_positions

CacheStack = tuple[Tensor, int]
"""Caches of one shape, stacked: [caches, *shape of one cache], and the stack's token axis. Axis 1 is the batch."""

RowMover = Callable[[Tensor, Tensor, Tensor, int], None]
"""Function (caches, index, changes, length) that reorders rows in place.

caches: [N, B, H, S, D]; index: int64 [B], the source row of every row; changes: bool [B, S], the entries that differ
between a row and its source row; length: number of tokens in use.
"""

logger = logging.getLogger(__name__)

THREADS_PER_BLOCK = 256
UNIT_TYPES = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}  # bytes -> C type

# One block handles one head of one cache. Its threads first check whether any of the next `blockDim.x` tokens changes
# in any row, then copy those tokens in units of up to 16 bytes. A thread reads its unit of all rows before it writes
# any, so that rows can be permuted without a temporary copy.
KERNEL = r"""
template <typename Unit, int ROWS>
__global__ void move_rows(Unit* caches, const long long* index, const bool* changes,
                          int heads, int bucket, int units, int length) {
    const size_t row = (size_t)heads * bucket * units;
    Unit* head = caches + (blockIdx.x / heads) * ROWS * row + (size_t)(blockIdx.x % heads) * bucket * units;
    for (int start = 0; start < length; start += blockDim.x) {
        const int checked = start + threadIdx.x;
        bool any = false;
        if (checked < length)
            for (int i = 0; i < ROWS; ++i) any |= changes[i * bucket + checked];
        if (!__syncthreads_or(any)) continue;
        const int end = min(start + (int)blockDim.x, length) * units;
        for (int at = start * units + threadIdx.x; at < end; at += blockDim.x) {
            const int token = at / units;
            Unit source[ROWS];
            bool changed = false;
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) changed |= changes[i * bucket + token];
            if (!changed) continue;
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) source[i] = head[index[i] * row + at];
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) if (changes[i * bucket + token]) head[i * row + at] = source[i];
        }
    }
}
"""


class BeamAncestry:
    """Table [B, S] of the row that computed each cache entry.

    It is used in one of two ways, until `reset(0)`. With `follow`, entries stay in the rows that computed them, and are
    read from there; `collect` ends that. With `reorder`, each row holds a copy of its entries: two rows with the same
    ancestor at a token hold the same keys and values there, so that token need not be copied.

    Args:
        rows: Number of sequences B, beams counted.
        bucket: Length S of the static caches, in tokens.
        device: Device of the caches.

    Attributes:
        table: The table, int32. Entries that are not in use are of their own row, where they will be written.
    """

    def __init__(self, rows: int, bucket: int, device: torch.device) -> None:
        self._columns = torch.arange(bucket, device=device)  # [S]
        self._own_row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]  # [B, 1]
        self.table = self._own_row.repeat(1, bucket)  # [B, S]
        self._move_rows = row_mover(device)

    def reset(self, start: int) -> None:
        """Mark the entries from token `start` on as computed by their own row."""
        self.table[:, start:] = self._own_row

    def copy_from(self, other: "BeamAncestry", length: int) -> None:
        """Take over the ancestry of the first `length` tokens, after the caches were copied to another bucket."""
        self.table[:, :length] = other.table[:, :length]

    def follow(self, index: Tensor, length: int | Tensor) -> Tensor:
        """Continue every row i from row `index[i]` without a copy. Arguments as of `reorder`.

        Returns:
            Entries whose row changes, bool [B, S].
        """
        reordered = self.table.index_select(0, index)  # [B, S]
        reordered = torch.where(self._columns < length, reordered, self._own_row)  # as `reset` leaves unused entries
        changes = reordered != self.table
        self.table.copy_(reordered)
        return changes

    def collect(self, length: int, stacks: Sequence[CacheStack]) -> None:
        """Copy the entries of the first `length` tokens from the rows that computed them to their own.

        Args:
            length: Number of tokens in use.
            stacks: See `reorder`.
        """
        for stack, token_axis in stacks:
            slots = stack.shape[token_axis]
            rows = self.table.index_select(1, held_positions(slots, length, self.table.device)).long()  # [B, slots]
            shape = [1] * (stack.ndim - 1)
            shape[0], shape[token_axis - 1] = rows.shape
            for each in stack:  # one at a time: the copy takes memory
                each.copy_(each.gather(0, rows.view(shape).expand_as(each)))
        self.reset(0)

    def reorder(self, index: Tensor, length: int | Tensor, stacks: Sequence[CacheStack]) -> None:
        """Replace the first `length` tokens of every row i by those of row `index[i]`, in place.

        Args:
            index: Source row of every row, int32 or int64 [B], on the device of the caches.
            length: Number of tokens in use; on the device, int64 [1], where a CUDA graph must not hold its value. Then
                unused tokens may be copied, too.
            stacks: All caches of this batch and bucket. Those shorter than the bucket are filled in turn.
        """
        index = index.long()  # transformers' beam search passes int32
        changes = self.follow(index, length)
        end = length if isinstance(length, int) else len(self._columns)
        for stack, token_axis in stacks:
            caches, rows, slots = len(stack), stack.shape[1], stack.shape[token_axis]
            heads = stack.shape[2:token_axis].numel()  # 1 where a cache has no head axis
            of_slots = changes
            if slots < len(self._columns):  # of a layer with a sliding window
                of_slots = changes.index_select(1, held_positions(slots, length, changes.device))
            by_head = stack.view(caches, rows, heads, slots, -1)  # [N, B, H, S, D]
            self._move_rows(by_head, index, of_slots, min(end, slots))


@cache
def row_mover(device: torch.device) -> RowMover:
    """Return the fastest function that reorders rows on `device`: on CUDA a kernel, if CuPy can compile it."""
    if device.type != "cuda":
        return move_rows_on_cpu
    if find_spec("cupy") is not None:
        try:
            compile_kernel(2, 2)
        except Exception as error:  # CuPy's errors for a missing library or header have no common base class
            logger.warning(
                f"beam reordering copies whole caches: CuPy can't compile its kernel: {str(error).splitlines()[0]}"
            )
        else:
            return move_rows_on_cuda
    return copy_rows


def move_rows_on_cpu(caches: Tensor, index: Tensor, changes: Tensor, length: int) -> None:
    """Reorder rows from the first to the last changed token. See `RowMover`."""
    changed = changes[:, :length].any(0).nonzero()
    if len(changed):
        copy_rows(caches, index, changes, int(changed[-1]) + 1, int(changed[0]))


def copy_rows(caches: Tensor, index: Tensor, changes: Tensor, length: int, start: int = 0) -> None:
    """Reorder all tokens from `start` on, through a temporary copy of one cache at a time. See `RowMover`."""
    for layer_cache in caches:  # [B, H, S, D]
        used = layer_cache[:, :, start:length]
        used.copy_(used.index_select(0, index))


def move_rows_on_cuda(caches: Tensor, index: Tensor, changes: Tensor, length: int) -> None:
    """Reorder changed tokens with one kernel launch on torch's current stream. See `RowMover`."""
    from numpy import int32

    from accel.engine.streams import cupy_stream

    count, rows, heads, bucket, width = caches.shape
    token_bytes = width * caches.element_size()
    unit_bytes = next(size for size in UNIT_TYPES if token_bytes % size == 0)
    pointers = [int(tensor.data_ptr()) for tensor in (caches, index, changes)]
    sizes = [int32(size) for size in (heads, bucket, token_bytes // unit_bytes, length)]
    with cupy_stream(torch.cuda.current_stream(caches.device)):
        kernel = compile_kernel(rows, unit_bytes)
        kernel((count * heads,), (THREADS_PER_BLOCK,), (*pointers, *sizes))


@cache
def compile_kernel(rows: int, unit_bytes: int) -> Callable[..., None]:
    """Compile the kernel for a number of rows and a copy unit.

    https://docs.cupy.dev/en/stable/user_guide/kernel.html

    Args:
        rows: Number of sequences, beams counted: a template argument, so that the loops over rows are unrolled.
        unit_bytes: Bytes that a thread copies at once, a key of `UNIT_TYPES`.

    Returns:
        CuPy's kernel, called as (grid, block, arguments).
    """
    import cupy

    name = f"move_rows<{UNIT_TYPES[unit_bytes]}, {rows}>"
    module = cupy.RawModule(code=KERNEL, options=("-std=c++17",), name_expressions=(name,))
    kernel: Callable[..., None] = module.get_function(name)
    return kernel
