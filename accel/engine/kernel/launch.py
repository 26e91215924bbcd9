"""Compile the kernel for a program, and launch it."""

import ctypes
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from accel import progress
from accel.engine.kernel import compiler, records, tuning
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Program
from accel.engine.kernel.watchdog import Watchdog
from accel.engine.streams import cupy_stream

logger = logging.getLogger(__name__)

THREADS = 288  # eight warps of consumers, and the producer
LIMIT = 1 << 19  # polls, each longer than half a microsecond; a wait for another block takes microseconds
SOURCES = ("numbers", "common", "low_bits", "product", "attention", "producer", "main")
CALLS = {
    "product": {
        "CONSUME": "product<{}>(s, op, ring, norms, tag, watch)",
        "PRODUCE": "produce_product<{}>(s, op, to, norms, once, keep)",
    },
    "normalize": {
        "CONSUME": "normalize<{}>(s, op, norms, tag, watch)",
        "PRODUCE": "produce_normalize<{}>(s, op, norms, keep)",
    },
    "attention": {
        "CONSUME": "attention<{}>(s, op, ring, tag, watch)",
        "PRODUCE": "produce_attention<{}>(s, op, to, keep)",
    },
}


@dataclass(frozen=True)
class Target:
    """What the kernel can use of a device.

    Attributes:
        memory: Bytes of shared memory that a block may have.
        bulk: Memory is copied in bulk, by instructions of compute capability 9.0 and higher.
    """

    memory: int
    bulk: bool

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        """Return what a GPU has."""
        properties: Any = torch.cuda.get_device_properties(device)  # its annotations lack the first
        return cls(properties.shared_memory_per_block_optin, properties.major >= 9)


def source(program: Program, target: Target, switches: Mapping[str, int] | None = None) -> str:
    """Return the kernel's source for a program.

    Args:
        program: The program.
        target: What it can use of the device.
        switches: Macros that tests set: see `common.cu`.
    """
    values = {
        "ROWS": program.rows,
        "BLOCKS": program.blocks,
        "BF16": int(program.dtype == torch.bfloat16),
        "BULK": int(target.bulk),
        "MEMORY": target.memory,
        "RECORD_BYTES": ctypes.sizeof(records.Record),
        "MAX_K": program.max_k,
        "MAX_NORM": program.max_norm,
        "WIDE_X": int(program.wide),
        "MAX_BIAS": program.max_bias,
        "MAX_GROUP": max((group for _, group in program.heads), default=1),
        "MAX_HEAD": max((size for size, _ in program.heads), default=8),
        "MAX_KEYS": max((records.keys_in_slot(size) // 8 for size, _ in program.heads), default=4),
        "LEAST_SLOTS": program.tuning.least_slots,
        "COPIES": program.tuning.in_flight,
        "SCALE_BYTES": program.scale_bytes,
    }
    macros = [f"#define {name} {value}" for name, value in (values | dict(switches or {})).items()]
    shapes: list[str] = []
    cases: dict[str, list[str]] = {"CONSUME": [], "PRODUCE": []}
    for index, shape in enumerate(program.shapes):
        shapes.append(f"struct Shape{index} {{\n  {shape.body}\n}};")
        for name, call in CALLS[shape.kind].items():
            cases[name].append(f"case {index}: {call.format(f'Shape{index}')}; break;")
    lists = [f"#define {name} {' '.join(lines)} default: break;" for name, lines in cases.items()]
    texts = [files(__package__).joinpath(f"{name}.cu").read_text(encoding="utf-8") for name in SOURCES]
    return "\n".join([*macros, *texts[:-1], *shapes, *lists, texts[-1]])


class Kernel:
    """A compiled kernel with its list of operations on the device.

    Args:
        program: The program.
        device: The device, for which `unsupported` gives no reason.
        watchdog: Told of launches that wait too long for a value of another block, which is a defect.
        switches: Macros that tests set: see `common.cu`.
        target: What it uses of the device; None: all.

    Attributes:
        state: Number of launches, of which the running one's tags what blocks exchange, and number of blocks that have
            begun it, int32 [2].

    Raises:
        NotRunnableError: It can't be compiled.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        watchdog: Watchdog,
        switches: Mapping[str, int] | None = None,
        target: Target | None = None,
    ) -> None:
        self._program, self._watchdog = program, watchdog
        data = b"".join(bytes(record) for record in program.operations)
        self._operations = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self._device = self._operations.device  # with its index
        target = target or Target.of(self._device)
        spare = program.tuning.spare_slots * records.slot_bytes(program.scale_bytes)
        target = replace(target, memory=target.memory - spare)
        self._memory = target.memory
        self._function = _load(source(program, target, switches), program.rows, self._device, target.memory)
        self.state = torch.zeros(2, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Launch the kernel on torch's current stream."""
        launches = self.state.data_ptr()
        addresses = (launches, launches + 4, self._watchdog.failed.data_ptr(), self._watchdog.error.data_ptr())
        arguments = (
            np.uint64(self._operations.data_ptr()),
            np.int32(len(self._program.operations)),
            np.uint64(self._program.position),
            *map(np.uint64, addresses),
            np.uint32(LIMIT),
        )
        grid, block = (self._program.blocks,), (THREADS,)
        with torch.cuda.device(self._device), cupy_stream(torch.cuda.current_stream()):
            self._function(grid, block, arguments, shared_mem=self._memory, enable_cooperative_groups=True)


def settings_for(
    program: Program, device: torch.device, measure: Callable[[tuning.Tuning], float] | None = None
) -> tuning.Tuning:
    """Return the settings for a program: those that are kept of a measurement, or measured now, or the defaults.

    Args:
        program: The program, with default settings.
        device: The device.
        measure: As for `tuning.tune`; None: nothing is measured.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    name = f"{properties.name} {properties.major}.{properties.minor}, {program.blocks} blocks"
    lengths = [operation.length for operation in program.operations]
    key = tuning.key(name, source(program, Target.of(device)), lengths)
    kept = tuning.kept(key)
    if kept is not None or measure is None:
        return kept or tuning.DEFAULT
    start = time.perf_counter()
    found = tuning.tune(measure)
    tuning.keep(key, found)
    progress.note(f"tuned the decode kernel for {program.rows} rows in {time.perf_counter() - start:.1f} s: {found}")
    return found


@cache
def unsupported(device: torch.device) -> str | None:
    """Return the reason why a device can't run the kernel, whatever the plan; None if it can."""
    if device.type != "cuda":
        return f"the kernel needs CUDA, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, and the kernel needs 8.0"
    if (reason := compiler.missing()) is not None:
        return reason
    if compiler.architecture_for(major, minor) is None:
        return f"the installed NVRTC can't compile for compute capability {major}.{minor}"
    return None


@cache
def _load(code: str, rows: int, device: torch.device, memory: int) -> Any:
    """Return the kernel's function on a device, compiled if it is not kept from an earlier process.

    Args:
        code: Its source.
        rows: Rows of the batch, for messages.
        device: The device.
        memory: Bytes of shared memory that a block has.

    Raises:
        NotRunnableError: The compiler refuses it, such as for lack of shared memory, or the driver.
    """
    from cupy.cuda import driver

    start = time.perf_counter()
    function, cubin = compiler.load(code, "decode", device)
    try:
        with torch.cuda.device(device):
            driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, memory)
    except driver.CUDADriverError as error:
        raise NotRunnableError(f"the driver refuses the compiled kernel: {error}") from error
    seconds = time.perf_counter() - start
    if cubin.kept:
        logger.info("loaded the decode kernel for %d rows in %.2f s (from %s)", rows, seconds, cubin.path)
    else:
        place = "not kept" if cubin.path is None else f"kept in {cubin.path.parent}"
        progress.note(f"compiled the decode kernel for {rows} rows in {seconds:.1f} s ({place})")
    return function
