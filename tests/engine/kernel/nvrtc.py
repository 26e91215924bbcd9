"""NVIDIA's run-time compiler from its wheel, which needs no GPU: https://docs.nvidia.com/cuda/nvrtc/."""

import ctypes
import re
from dataclasses import dataclass
from importlib.metadata import files

OPTIONS = ("-std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel.

    Attributes:
        log: Its messages.
        registers: Registers of a thread.
        spilled: Bytes that a thread stores to memory for want of registers.
    """

    log: str
    registers: int
    spilled: int


def library() -> ctypes.CDLL:
    """Load the library, and first the one that it looks for by name."""
    paths = {
        path.name.split(".so")[0]: path.locate() for path in files("nvidia-cuda-nvrtc") or [] if ".so" in path.name
    }
    ctypes.CDLL(str(paths["libnvrtc-builtins"]), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(paths["libnvrtc"]))


def compile_for(source: str, architecture: str) -> Compiled:
    """Compile CUDA source for a GPU architecture such as `sm_90`.

    Raises:
        RuntimeError: The compiler refuses it. The message is its log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", *OPTIONS]
    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if status:
        raise RuntimeError(text)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", text)]
    return Compiled(text, max(registers), sum(spilled))
