"""Rough estimate of the time, memory and disk that a build takes, made before it begins."""

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from accel import progress
from accel.config.schema import Config
from accel.errors import AccelError
from accel.models.model_class import model_class

logger = logging.getLogger(__name__)

ANNOUNCED = 45.0  # seconds: shorter builds are not announced
REFUSED = 0.5  # share of the estimated disk space; with less, the build can't end
GB = 1e9
# Fitted to SmolLM2-135M and T5-small dimensions on two CPU cores, see docs/benchmarks/pipeline.md.
SECONDS_AT_ANY_SIZE = 10.0  # imports, keys and hashes of files
SECONDS_PER_TRACE = 10.5  # in `export`, which traces a few layers whatever their number
SECONDS_OF_WORKERS = 5.0  # imports in `verify` of the processes that measure latency
SECONDS_PER_MODULE = {"optimize": 0.023}  # per innermost module
SECONDS_PER_MILLION = {  # per million parameters, for what reads all weights again and again
    "answers": 0.05,
    "export": 0.08,
    "calibrate": 0.6,
    "audit": 0.4,
    "convert": 0.01,
    "merge": 0.01,
    "reference": 0.12,
    "torch_error": 0.07,
    "verify": 0.16,
    "benchmark": 0.5,
}
BASE_MEMORY = 0.7e9  # bytes that Python, torch and a traced graph take, whatever the model
WEIGHTS_IN_MEMORY = 2.0  # FP32 copies of the weights at the peak: while they load, the checkpoint is mapped as well
# Copies of the weights that each stage leaves on disk, which prefill and decode share; from `convert` on half as large
# in 16 bits.
COPIES = {"checkpoint": 1, "export": 1, "optimize": 1, "convert": 1, "merge": 1, "verify": 1}
CONVERTED = ("convert", "merge", "verify")


@dataclass(frozen=True)
class Size:
    """Size of a model.

    Attributes:
        parameters: Number of parameters; shared ones count once.
        modules: Number of innermost modules.
        traces: Number of graphs that `export` traces: the decoder, and the encoder if there is one.
    """

    parameters: int
    modules: int
    traces: int = 1

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Size | None":
        """Return the size of the model with this Hugging Face config, without making its weights; None if unknown."""
        try:
            with torch.device("meta"):
                model = model_class(config)(config)
        except Exception as error:  # of any class: a model's own code may need real tensors
            logger.info(f"no estimate: {error}")
            return None
        modules = sum(not any(module.children()) for module in model.modules())
        traces = 2 if config.is_encoder_decoder else 1
        return cls(sum(each.numel() for each in model.parameters()), modules, traces)


@dataclass(frozen=True)
class Estimate:
    """What a build takes: seconds on two CPU cores, bytes of memory at its peak, and bytes of disk."""

    seconds: float
    memory: float
    disk: float

    @classmethod
    def of(cls, size: Size, stages: Collection[str], half: bool) -> "Estimate":
        """Return the estimate for the stages that will run; `half`: in 16 bits."""
        seconds = SECONDS_AT_ANY_SIZE
        if "export" in stages:
            seconds += SECONDS_PER_TRACE * size.traces
        if "verify" in stages:
            seconds += SECONDS_OF_WORKERS
        for stage in stages:
            seconds += size.parameters / 1e6 * SECONDS_PER_MILLION.get(stage, 0.0)
            seconds += size.modules * SECONDS_PER_MODULE.get(stage, 0.0)
        weights = 4.0 * size.parameters  # bytes in FP32
        disk = 0.0
        for stage in stages:
            disk += COPIES.get(stage, 0) * weights * (0.5 if half and stage in CONVERTED else 1.0)
        return cls(seconds, BASE_MEMORY + WEIGHTS_IN_MEMORY * weights, disk)

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        return (
            f"roughly {minutes} on two CPU cores, {self.memory / GB:.1f} GB of memory at the peak and "
            f"{self.disk / GB:.1f} GB of disk"
        )


def announce(config: Config, description: PretrainedConfig, stages: Collection[str]) -> None:
    """Report what a long build will take, and warn if the disk may have too little space.

    Args:
        config: The configuration.
        description: The model's Hugging Face config.
        stages: Names of the stages that will run, hidden ones included.

    Raises:
        AccelError: Less than `REFUSED` of the estimate is free.
    """
    size = Size.of(description) if stages else None
    if size is None:
        return
    estimate = Estimate.of(size, stages, half=config.precision.dtype != "float32")
    if estimate.seconds >= ANNOUNCED:
        progress.note(f"{size.parameters / 1e6:.0f} million parameters: {estimate}")
    folder = Path(config.artifacts).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = (
        f"artifacts={config.artifacts}: the build takes about {estimate.disk / GB:.1f} GB of disk, but only "
        f"{free / GB:.1f} GB are free. Free some space, or set artifacts=FOLDER to a folder on another disk"
    )
    if free < REFUSED * estimate.disk:
        raise AccelError(message)
    if free < estimate.disk:
        logger.warning(message)
