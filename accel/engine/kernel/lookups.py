"""Rows of tables, copied in one launch for all tables of a step, where torch takes one or two for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.engine.streams import cupy_stream

THREADS = 256
FIELDS = 5  # numbers of 64 bits in a record of the kernel

# A block copies one row.
KERNEL = r"""
struct Record {
    const char* table;
    const long long* index;
    char* value;
    long long bytes, count;
};

extern "C" __global__ void look_up(const Record* records) {
    const Record record = records[blockIdx.y];
    const int row = blockIdx.x;
    long long index = record.index[row];
    if (index < 0) index += record.count;
    const char* from = record.table + index * record.bytes;
    char* to = record.value + row * record.bytes;
    const long long all_bits = (long long)record.table | (long long)record.value | record.bytes;
    if (all_bits % 16 == 0) {
        for (int i = threadIdx.x; i < record.bytes / 16; i += blockDim.x) ((uint4*)to)[i] = ((const uint4*)from)[i];
    } else {
        for (int i = threadIdx.x; i < record.bytes; i += blockDim.x) to[i] = from[i];
    }
}
"""


@dataclass(frozen=True)
class Lookup:
    """A value that is looked up.

    Attributes:
        table: Rows of any shape, [entries, ...].
        index: Entry that each row of the batch is at, int64 with as many elements as the batch has rows, at a constant
            address. Negative ones count from the end.
        value: These entries, [rows, ...], at a constant address.
    """

    table: Tensor
    index: Tensor
    value: Tensor


class Lookups:
    """Call that looks up the values of some tables.

    Args:
        lookups: The values. All have the same number of rows.
        device: Their device.
    """

    def __init__(self, lookups: Sequence[Lookup], device: torch.device) -> None:
        self._lookups, self._device = list(lookups), device
        self._records = torch.tensor([record(each) for each in lookups], dtype=torch.int64, device=device)

    def __call__(self) -> None:
        """Copy the entries that the indices now name, on torch's current stream."""
        if not self._lookups:
            return
        if self._device.type != "cuda":
            for each in self._lookups:
                each.value.copy_(each.table[each.index.flatten()].view_as(each.value))
            return
        grid = (self._lookups[0].index.numel(), len(self._lookups))
        with torch.cuda.device(self._device), cupy_stream(torch.cuda.current_stream(self._device)):
            _kernel(self._records.device)(grid, (THREADS,), (np.uint64(self._records.data_ptr()),))


def record(lookup: Lookup) -> list[int]:
    """Return the kernel's record of a lookup."""
    table, rows = lookup.table, lookup.index.numel()
    row_bytes = lookup.value.nbytes // rows
    if not table.is_contiguous() or not lookup.value.is_contiguous() or table.nbytes != row_bytes * len(table):
        raise ValueError(f"a table {list(table.shape)} has no rows for a value {list(lookup.value.shape)}")
    return [table.data_ptr(), lookup.index.data_ptr(), lookup.value.data_ptr(), row_bytes, len(table)]


@cache
def _kernel(device: torch.device) -> Any:
    """Return the compiled kernel."""
    import cupy

    with torch.cuda.device(device):
        return cupy.RawModule(code=KERNEL, options=("-std=c++17",)).get_function("look_up")
