"""The first artifact: a folder with a Hugging Face model. Local, from the hub, or random weights made once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import Config, ModelConfig
from accel.errors import AccelError, unknown
from accel.models.checkpoints import locate, model_config
from accel.models.model_class import model_class
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Random weights: initialise on the CPU from the seed and save."""
    description = model_config(config.model)
    torch.manual_seed(config.model.seed)
    with torch.device("cpu"):
        model = model_class(description)(description)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    progress.note(f"random weights: {parameters / 1e6:.1f} M parameters from seed {config.model.seed}")
    return {"parameters": parameters}


def reference_files(config: Config) -> tuple[str, ...]:
    """Texts and references outside the checkpoint's folder: their content counts, as the checkpoint's own does."""
    path = config.model.references
    own = [path] if path is not None and Path(path).is_absolute() else []
    return (*own, *(given for given in (config.verify.texts, config.verify.targets) if given is not None))


def check(model: ModelConfig) -> None:
    """Raises `AccelError` if `model` can't name a checkpoint."""
    if model.weights not in ("pretrained", "random"):
        raise unknown("model.weights", model.weights, ("pretrained", "random"))
    if not model.checkpoint and not (model.weights == "random" and model.config):
        raise AccelError(f"model={model.name}: model.checkpoint is missing; give a folder or a hub id")


def described_by(config: Config) -> tuple[str, ...]:
    """The file that random weights take their dimensions from, unless `model.config` holds them."""
    return () if config.model.config else (str(locate(config.model, weights=False) / "config.json"),)


STAGE = Stage(
    name="checkpoint",
    run=run,
    inputs=takes(),
    sections=("model",),
    packages=("torch", "transformers"),
    files=described_by,
)
