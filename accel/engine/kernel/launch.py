"""Compile the kernel for a program, and launch it."""

import ctypes
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.engine.kernel import records
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Program
from accel.engine.streams import cupy_stream

THREADS = 288  # eight warps of consumers, and the producer
LIMIT = 1 << 22  # polls, each longer than half a microsecond; a wait for another block takes microseconds
SOURCES = ("common", "product", "attention", "producer", "main")
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


def source(program: Program, memory: int) -> str:
    """Return the kernel's source for a program.

    Args:
        program: The program.
        memory: Bytes of shared memory that a block may have.
    """
    values = {
        "ROWS": program.rows,
        "BLOCKS": program.blocks,
        "BF16": int(program.dtype == torch.bfloat16),
        "MEMORY": memory,
        "MAX_K": program.max_k,
        "MAX_NORM": program.max_norm,
        "WIDE_X": int(program.wide),
        "MAX_BIAS": program.max_bias,
        "MAX_GROUP": max((group for _, group in program.heads), default=1),
        "MAX_HEAD": max((size for size, _ in program.heads), default=8),
        "MAX_KEYS": max((16384 // (2 * size) // 8 for size, _ in program.heads), default=4),
    }
    macros = [f"#define {name} {value}" for name, value in values.items()]
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
        error: Pinned memory of the host, int32 [1]. A launch that waits too long for a value of another block, which is
            a defect, writes the index of the waiting operation plus one.

    Raises:
        NotRunnableError: It can't be compiled.
    """

    def __init__(self, program: Program, device: torch.device, error: Tensor) -> None:
        self._program, self._device, self._error = program, device, error
        memory = _shared_memory(device)
        self._function, self._memory = _compiled(source(program, memory))
        data = b"".join(bytes(record) for record in program.operations)
        self._operations = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self._state = torch.zeros(2, dtype=torch.int32, device=device)  # launches, and blocks of one that have begun

    def __call__(self) -> None:
        """Launch the kernel on torch's current stream."""
        addresses = (self._state.data_ptr(), self._state.data_ptr() + 4, self._error.data_ptr())
        arguments = (
            np.uint64(self._operations.data_ptr()),
            np.int32(len(self._program.operations)),
            np.uint64(self._program.position),
            *map(np.uint64, addresses),
            np.uint32(LIMIT),
        )
        with cupy_stream(torch.cuda.current_stream(self._device)):
            self._function((self._program.blocks,), (THREADS,), arguments, shared_mem=self._memory)


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # its annotations lack this one
    return int(properties.shared_memory_per_block_optin)


def unsupported(device: torch.device) -> str | None:
    """Return the reason why a device can't run the kernel; None if it can."""
    if device.type != "cuda":
        return f"the kernel needs CUDA, not {device.type}"
    if find_spec("cupy") is None:
        return "the kernel is compiled by CuPy, which is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 else f"the device has compute capability {major}.{minor}, and the kernel needs 9.0"


@cache
def _compiled(code: str) -> tuple[Any, int]:
    """Return the compiled function, and the bytes of shared memory that it needs.

    Raises:
        NotRunnableError: The compiler refuses it, such as for lack of shared memory.
    """
    import cupy

    try:
        module = cupy.RawModule(code=code, options=("-std=c++17",), backend="nvrtc", enable_cooperative_groups=True)
        function = module.get_function("decode")
    except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line] or [type(error).__name__]
        raise NotRunnableError(f"the kernel can't be compiled: {lines[0]}") from error
    memory, record = (int(size) for size in cupy.ndarray(2, cupy.int32, module.get_global("sizes")).get())
    if record != ctypes.sizeof(records.Record):
        raise NotRunnableError(f"a record has {record} bytes in CUDA, and {ctypes.sizeof(records.Record)} here")
    function.max_dynamic_shared_size_bytes = memory
    return function, memory
