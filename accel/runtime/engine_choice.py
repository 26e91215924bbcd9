"""The engine that `runtime.engine=auto` stands for: what ships is what is verified."""

import json
import logging

import torch

from accel.config.engines import AUTO, FUSED, ONNXRUNTIME
from accel.runtime.layout import DeployableFiles

logger = logging.getLogger(__name__)


def choose_engine(requested: str, files: DeployableFiles, device: torch.device) -> str:
    """Return the engine that is to compute decode steps over static caches.

    `auto` is the fused engine where the deployable's verification result names it and the device can run its kernel
    (compute capability 8.0, CuPy, NVRTC of CUDA 12). If only the latter is missing, a warning says why. In all other
    cases it is ONNX Runtime, also in a bundle that nobody verified. Verification tries `engines_to_verify`.

    Args:
        requested: One of `accel.config.engines.ENGINES`.
        files: Files of the bundle or deployable.
        device: Device of the decode step.

    Returns:
        `onnxruntime` or `fused`.
    """
    if requested != AUTO:
        return requested
    if verified_engine(files) != FUSED:
        return ONNXRUNTIME
    from accel.engine.kernel.launch import unsupported  # here, as it brings the planner along

    reason = unsupported(device)
    if reason is None:
        return FUSED
    logger.warning(
        f"{files.folder} was verified with the engine {FUSED}, which can't run here: {reason}. "
        f"{ONNXRUNTIME} takes its place, slower"
    )
    return ONNXRUNTIME


def engines_to_verify(requested: str, device: torch.device, dtype: str) -> list[str]:
    """Return the engines that a bundle may be verified with, the fastest first: the first that passes is taken.

    The fused engine is no slower wherever it was measured (docs/engine.md), and ONNX Runtime takes its place where the
    device can't run its kernel, which has none for FP32, or its sums, in another order, don't pass.

    Args:
        requested: One of `accel.config.engines.ENGINES`.
        device: Device of the decode step.
        dtype: Dtype of the weights, such as `float16`.
    """
    if requested != AUTO:
        return [requested]
    if dtype == "float32":
        return [ONNXRUNTIME]
    from accel.engine.kernel.launch import unsupported  # here, as it brings the planner along

    return [FUSED, ONNXRUNTIME] if unsupported(device) is None else [ONNXRUNTIME]


def verified_engine(files: DeployableFiles) -> str | None:
    """Return the engine that a variant passed its verification with; None if it has no such result."""
    try:
        result = json.loads(files.verification.read_text(encoding="utf-8"))
        return str(result["engine"]) if result["passed"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
