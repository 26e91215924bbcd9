"""Compile CUDA source by NVRTC, and keep what was compiled in the user's cache."""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any

import torch

from accel.engine.kernel.placement import NotRunnableError
from accel.system.user_cache import PRIVATE, user_cache

logger = logging.getLogger(__name__)

FOLDER = "kernels"
OPTIONS = ("-std=c++17",)
OLDEST = 12  # CUDA version whose NVRTC has all that the source needs
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Cubin:
    """Compiled code for one GPU architecture.

    Attributes:
        data: The code.
        path: Where it is kept, after its SHA-256; None where nothing can be kept.
        kept: An earlier compilation was kept and is used.
    """

    data: bytes
    path: Path | None
    kept: bool


def compiled(source: str, architecture: str) -> Cubin:
    """Return compiled CUDA source, from the user's cache if it has been compiled before by the same NVRTC.

    The files may be deleted at any time. Processes that compile the same source replace each other's file by an equal
    one.

    Args:
        source: CUDA C++ without includes.
        architecture: GPU architecture such as `sm_90`.

    Raises:
        NotRunnableError: NVRTC can't be loaded, or refuses the source.
    """
    key = "\0".join([source, architecture, *OPTIONS, *map(str, _nvrtc().getVersion())])
    folder = _folder()
    path = None if folder is None else folder / f"{architecture}-{hashlib.sha256(key.encode()).hexdigest()}"
    kept = None if path is None else _read(path)
    if kept is not None:
        return Cubin(kept, path, True)
    data = _compile(source, architecture)
    return Cubin(data, path if path is not None and _write(path, data) else None, False)


def load(source: str, name: str, device: torch.device) -> tuple[Any, Cubin]:
    """Return a function of CUDA source, on a device, and the compiled code that it is of.

    Args:
        source: CUDA C++ without includes.
        name: Name of the function, which is `extern "C"`.
        device: A GPU.

    Raises:
        NotRunnableError: NVRTC can't be loaded, can't compile for the device, or refuses the source, or the driver
            refuses the code.
    """
    from cupy.cuda import driver
    from cupy.cuda.function import Module

    major, minor = torch.cuda.get_device_capability(device)
    architecture = architecture_for(major, minor)
    if architecture is None:
        raise NotRunnableError(f"the installed NVRTC can't compile for compute capability {major}.{minor}")
    cubin = compiled(source, architecture)
    module = Module()
    try:
        with torch.cuda.device(device):
            module.load(cubin.data)
            return module.get_function(name), cubin
    except driver.CUDADriverError as error:
        raise NotRunnableError(f"the driver refuses the compiled kernel: {error}") from error


def missing() -> str | None:
    """Return the reason why nothing can be compiled; None if something can."""
    if find_spec("cupy") is None:
        return "the kernel is compiled by CuPy, which is not installed"
    try:
        major, minor = _nvrtc().getVersion()
    except NotRunnableError as error:
        return str(error)
    return None if major >= OLDEST else f"the kernel needs NVRTC of CUDA {OLDEST} or later, not {major}.{minor}"


def architecture_for(major: int, minor: int) -> str | None:
    """Return the GPU architecture to compile for, given a compute capability: the newest that NVRTC knows up to it.

    Code runs on later capabilities with the same major number:
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility.

    Returns:
        Such as `sm_90`; None if NVRTC knows none.
    """
    known = [int(number) for number in _nvrtc().getSupportedArchs()]
    fitting = [number for number in known if number // 10 == major and number <= 10 * major + minor]
    return f"sm_{max(fitting)}" if fitting else None


@cache
def _nvrtc() -> Any:
    """Return CuPy's module for NVRTC, with the library loaded; raise `NotRunnableError` if it can't be."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotRunnableError(f"CuPy can't load NVRTC: {reason}") from error
    return nvrtc


def _compile(source: str, architecture: str) -> bytes:
    """Return compiled source; raise `NotRunnableError` with the compiler's first message if it is refused."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}", *OPTIONS))
        data: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        lines = [line for line in nvrtc.getProgramLog(program).splitlines() if "error" in line] or [str(error)]
        raise NotRunnableError(f"the kernel can't be compiled: {lines[0]}") from error
    finally:
        nvrtc.destroyProgram(program)
    return data


def _folder() -> Path | None:
    """Return the folder of compiled kernels, made if need be; None if there can be none."""
    root = user_cache()
    if root is None:
        return None
    try:
        (root / FOLDER).mkdir(mode=PRIVATE, exist_ok=True)
    except OSError as error:
        logger.debug("compiled kernels are not kept: %s", error)
        return None
    return root / FOLDER


def _read(path: Path) -> bytes | None:
    """Return the code in a file; None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() == digest:
        return data
    logger.warning("%s is damaged, and is compiled again", path)
    return None


def _write(path: Path, data: bytes) -> bool:
    """Replace a file at once, so that another process reads the old or the new one; return whether it was possible."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}-{get_ident()}")
    try:
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(path)
    except OSError as error:
        logger.debug("%s is not kept: %s", path, error)
        temporary.unlink(missing_ok=True)
        return False
    return True
