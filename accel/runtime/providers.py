"""Execution providers of the installed ONNX Runtime, and error messages that name what a provider needs."""

import ctypes
import importlib.metadata
import re
from functools import cache
from pathlib import Path

import torch

from accel.errors import AccelError, unknown

EXTRAS = "accel-onnx[cpu], accel-onnx[cuda13], accel-onnx[cuda12] or accel-onnx[cuda11]"

try:
    import onnxruntime as onnxruntime  # imported by the other modules from here, so that its absence has one message
except ImportError as error:
    raise AccelError(f"ONNX Runtime (onnxruntime) is not installed. pip install one extra: {EXTRAS}") from error

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SMALLEST_MODEL = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Identity(x) }'
RUNTIME_ERRORS = tuple(  # ONNX Runtime's exception classes have no common base class
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
LIBRARIES = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")  # in the order of loading


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime, fastest first."""
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


@cache
def operator_names() -> frozenset[str]:
    """Return the names of all operators that ONNX Runtime has a schema of."""
    schemas = onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    return frozenset(schema.name for schema in schemas)


def fastest() -> str:
    """Return the fastest preset for any weights: `cuda-graph` if ONNX Runtime can use a GPU, else `cpu`."""
    return "cuda-graph" if CUDA in available_providers() and torch.cuda.is_available() else "cpu"


def runs_kernel() -> bool:
    """Return whether the GPU can run the fused engine's kernel, with weights of 16 bits: see `docs/engine.md`."""
    from accel.engine.kernel.launch import unsupported  # here, as it brings the planner along

    return torch.cuda.is_available() and unsupported(torch.device("cuda")) is None


def check_provider(provider: str) -> None:
    """Check that a provider can be used.

    Args:
        provider: ONNX Runtime's name of the provider.

    Raises:
        AccelError: ONNX Runtime lacks the provider, its device or its libraries are missing, or the wheels for CPU and
            GPU are both installed.
    """
    wheels = ("onnxruntime", "onnxruntime-gpu")
    folders = [folder for folder in map(_installation_folder, wheels) if folder is not None]
    if len(set(folders)) < len(folders):
        raise AccelError(
            f"{' and '.join(wheels)} are both installed and overwrite each other's files; "
            f"pip uninstall both, then install one extra: {EXTRAS}"
        )
    if provider == CUDA:
        _check_cuda()
    elif provider not in available_providers():
        raise unknown("execution provider (runtime.provider)", provider, available_providers())


def check_device(device: str) -> None:
    """Check that torch can compute on a device.

    Args:
        device: torch's name of the device.

    Raises:
        AccelError: There is no such device, or this torch can't use it.
    """
    try:
        torch.ones(1, device=device).tolist()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # torch has no class for this
        raise AccelError(f"runtime.device={device}: torch can't use it: {str(error).splitlines()[0]}") from error


def supports_dtype(dtype: str, device: str) -> bool:
    """Return True if the device's hardware computes in `dtype`: bfloat16 needs CUDA compute capability 8.0 on a GPU."""
    return dtype != "bfloat16" or not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (8, 0)


def _check_cuda() -> None:
    """Check that the CUDA provider, a GPU and the provider's libraries are there, in this order."""
    if CUDA not in available_providers():
        raise AccelError(
            f"runtime=cuda needs onnxruntime-gpu; the onnxruntime {onnxruntime.__version__} installed here is the "
            "CPU's. pip uninstall onnxruntime, then install accel-onnx[cuda13], accel-onnx[cuda12] or "
            "accel-onnx[cuda11]; or use runtime=cpu"
        )
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
        raise AccelError(
            f"runtime=cuda needs a GPU, and torch {torch.__version__}, built {build}, finds none. "
            "Check that nvidia-smi lists one, or use runtime=cpu"
        )
    if not _loads(CUDA):
        raise AccelError(missing_library())


@cache
def _loads(provider: str) -> bool:
    """Return True if a session gets the provider: ONNX Runtime silently drops one whose libraries it can't load."""
    import onnx.parser

    model = onnx.parser.parse_model(SMALLEST_MODEL).SerializeToString()
    return provider in onnxruntime.InferenceSession(model, providers=[provider]).get_providers()


def missing_library() -> str:
    """Return a message that names the library without which the CUDA provider can't be loaded, and what to install."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    reason = "its CUDA provider could not be loaded"
    try:
        for name in LIBRARIES:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        library = re.match(r"(\S+): cannot open shared object file", str(error))
        reason = f"{library[1]} is missing" if library else str(error)
    major = _cuda_version().split(".")[0]
    extra = f"accel-onnx[cuda{major}]" if f"cuda{major}" in EXTRAS else "the extra for your CUDA"
    return (
        f"onnxruntime-gpu {onnxruntime.__version__} can't use CUDA here: {reason}. It is built for CUDA {major}: "
        f"install {extra} with a torch built for CUDA {major}, which brings its libraries "
        f"(this torch is built for {torch.version.cuda or 'the CPU'}); or use runtime=cpu"
    )


def _cuda_version() -> str:
    """Return the CUDA version that ONNX Runtime was built for, as recorded in its wheel; "unknown" without one."""
    from onnxruntime.capi import build_and_package_info

    return str(getattr(build_and_package_info, "cuda_version", "") or "unknown")


def _installation_folder(package: str) -> Path | None:
    """Return the folder that a distribution is installed in; None if it isn't installed."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None
