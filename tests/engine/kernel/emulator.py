"""The kernel built by a C++ compiler, with a thread of the host for each of its threads, one block after another.

What CUDA has and C++ hasn't is replaced: functions that hold an instruction of the GPU, and built-in ones. So it shows
which numbers the kernel computes, and nothing about time or races. As blocks run one after another, an operation
can't read what another one of the program computes.
"""

import ctypes
import re
import subprocess
from pathlib import Path

from accel.engine.kernel.launch import LIMIT, Target, source
from accel.engine.kernel.program import Program

HERE = Path(__file__).parent
INSTRUCTIONS = (  # functions that `instructions.h` defines in their place
    "wide(T v)",
    "wide(T2 v)",
    "narrow(float a, float b)",
    *("barrier_init", "arrive", "expect", "bulk_copy", "async_copy", "async_arrive", "fence", "wait", "unhoisted"),
    *("sync", "load2", "load1", "store", "mma", "mma_first", "minus", "multiply_add", "mask_or"),
)


def without(text: str, name: str) -> str:
    """Return C++ without the definitions of a device function, `name` of which may include its parameters."""
    pattern = re.compile(rf"^__device__ __forceinline__ [\w ]+ {re.escape(name)}{'' if '(' in name else r'[(]'}", re.M)
    while found := pattern.search(text):
        end = text.index("{", found.end())
        depth = 1
        while depth:
            end += 1
            depth += {"{": 1, "}": -1}.get(text[end], 0)
        text = text[: found.start()] + text[end + 1 :]
    return text


def on_host(text: str, more: str = "") -> str:
    """Return CUDA source for the host.

    Args:
        text: The source, with that of `numbers.cu`.
        more: Definitions to put behind those of the types of numbers.
    """
    for name in INSTRUCTIONS:
        text = without(text, name)
    lines = ["" if "createpolicy" in line else line for line in text.splitlines()]
    text = "\n".join(lines).replace("extern __shared__ __align__(128) unsigned char memory[];", "")
    types = "typedef u32 T2;            // two of them, the first in the low half\n"
    assert types in text
    host, instructions = ((HERE / f"{name}.h").read_text() for name in ("host", "instructions"))
    return f"{host}\n{text.replace(types, types + instructions + more)}"


def compiled(text: str, folder: Path) -> ctypes.CDLL:
    """Compile C++ for the host, and load it."""
    path, library = folder / "kernel.cpp", folder / "kernel.so"
    path.write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", str(library), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def run(program: Program, target: Target, folder: Path) -> None:
    """Compile a program's kernel, and launch it once."""
    memory = "alignas(128) static unsigned char memory[MEMORY];\n"
    text = on_host(source(program, target), memory)
    library = compiled(f"{text}\n#define LIMIT {LIMIT}\n{(HERE / 'launch.h').read_text()}", folder)
    records = (ctypes.c_char * sum(ctypes.sizeof(record) for record in program.operations)).from_buffer(
        bytearray(b"".join(bytes(record) for record in program.operations))
    )
    state, failed, error = (ctypes.c_uint32 * 2)(), ctypes.c_int(), ctypes.c_int()
    library.launch(records, len(program.operations), state, ctypes.byref(failed), ctypes.byref(error))
    assert (failed.value, error.value) == (0, 0)
