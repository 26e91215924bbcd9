"""Which execution providers there are, and what is missing for the one that was asked for."""

import ctypes
import importlib.metadata
import re
from functools import cache
from pathlib import Path

import torch

from accel.errors import AccelError, unknown

EXTRAS = "accel-onnx[cpu], accel-onnx[cuda13], accel-onnx[cuda12] or accel-onnx[cuda11]"

try:
    import onnxruntime as onnxruntime  # for the rest of the package: here its absence has one message
except ImportError as error:
    raise AccelError(f"ONNX Runtime (onnxruntime) is not installed. pip install one extra: {EXTRAS}") from error

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SMALLEST = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Identity(x) }'
RUNTIME_ERRORS = tuple(  # ONNX Runtime's own have no common base
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
LIBRARIES = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")


def available_providers() -> list[str]:
    """The execution providers of the installed ONNX Runtime, best first."""
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def fastest() -> str:
    """The preset that `runtime=auto` stands for here: `cuda` where there is a GPU and ONNX Runtime can use it."""
    return "cuda" if CUDA in available_providers() and torch.cuda.is_available() else "cpu"


def check_provider(provider: str) -> None:
    """Raises `AccelError` if the provider or its device isn't there, or if both wheels lie in one folder."""
    wheels = ("onnxruntime", "onnxruntime-gpu")
    folders = [folder for folder in map(_folder, wheels) if folder is not None]
    if len(set(folders)) < len(folders):
        raise AccelError(
            f"{' and '.join(wheels)} are both installed and overwrite each other's files; "
            f"pip uninstall both, then install one extra: {EXTRAS}"
        )
    if provider == CUDA:
        _check_cuda()
    elif provider not in available_providers():
        raise unknown("execution provider", provider, available_providers())


def computes(dtype: str, device: str) -> bool:
    """Whether the hardware of `device` computes in `dtype`: bfloat16 came to GPUs with compute capability 8.0."""
    return dtype != "bfloat16" or not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (8, 0)


def _check_cuda() -> None:
    if CUDA not in available_providers():
        raise AccelError(
            f"runtime=cuda needs onnxruntime-gpu; the onnxruntime {onnxruntime.__version__} installed here is the "
            "CPU's. pip uninstall onnxruntime, then install accel-onnx[cuda13], accel-onnx[cuda12] or "
            "accel-onnx[cuda11]; or use runtime=cpu"
        )
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
        raise AccelError(
            f"runtime=cuda needs a GPU, and torch {torch.__version__}, built {built}, sees none. "
            "Does nvidia-smi list one? runtime=cpu runs anywhere"
        )
    if not _loads(CUDA):
        raise AccelError(missing_library())


@cache
def _loads(provider: str) -> bool:
    """Whether a session gets the provider. ONNX Runtime goes on without one whose libraries it doesn't find."""
    import onnx.parser

    model = onnx.parser.parse_model(SMALLEST).SerializeToString()
    return provider in onnxruntime.InferenceSession(model, providers=[provider]).get_providers()


def missing_library() -> str:
    """Why ONNX Runtime left its CUDA provider out: the library it did not find, and what brings it."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    reason = "its CUDA provider could not be loaded"
    try:
        for name in LIBRARIES:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        found = re.match(r"(\S+): cannot open shared object file", str(error))
        reason = f"{found[1]} is missing" if found else str(error)
    major = str(_built_for()).split(".")[0]
    extra = f"accel-onnx[cuda{major}]" if f"cuda{major}" in EXTRAS else "the extra for your CUDA"
    return (
        f"onnxruntime-gpu {onnxruntime.__version__} can't use CUDA here: {reason}. It is built for CUDA {major}: "
        f"install {extra} with a torch built for CUDA {major}, which brings its libraries "
        f"(this torch is built for {torch.version.cuda or 'the CPU'}); or use runtime=cpu"
    )


def _built_for() -> str:
    """CUDA version that ONNX Runtime was compiled against, as its wheel says."""
    from onnxruntime.capi import build_and_package_info

    return str(getattr(build_and_package_info, "cuda_version", "") or "unknown")


def _folder(package: str) -> Path | None:
    """Where a package is installed, or None."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None
