"""Provide the checkpoint, the pipeline's first artifact: a folder with a Hugging Face model.

Reads:
    `config.json` of the model, unless `model.config` holds the dimensions. A pretrained checkpoint (local or from the
    hub) is used where it is, and this stage doesn't run.

Writes:
    With `model.weights=random`, `config.json` and the weights, as `save_pretrained` does.
"""

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
    """Initialise random weights on the CPU from `model.seed` and save them. Return the number of parameters."""
    hf_config = model_config(config.model)
    torch.manual_seed(config.model.seed)
    with torch.device("cpu"):
        model = model_class(hf_config)(hf_config)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    progress.note(f"random weights: {parameters / 1e6:.1f} M parameters from seed {config.model.seed}")
    return {"parameters": parameters}


def reference_files(config: Config) -> tuple[str, ...]:
    """Return the texts and references outside the checkpoint's folder, whose content counts for a stage's key.

    Files inside the folder count with the checkpoint's own content.
    """
    paths = []
    if config.model.references is not None and Path(config.model.references).is_absolute():
        paths.append(config.model.references)
    for path in (config.verify.texts, config.verify.targets):
        if path is not None:
            paths.append(path)
    return tuple(paths)


def check(model: ModelConfig) -> None:
    """Check that `model` names a checkpoint.

    Raises:
        AccelError: `model.weights` has an unknown value, or `model.checkpoint` is missing.
    """
    if model.weights not in ("pretrained", "random"):
        raise unknown("model.weights", model.weights, ("pretrained", "random"))
    if not model.checkpoint and not (model.weights == "random" and model.config):
        raise AccelError(f"model={model.name}: model.checkpoint is missing; give a folder or a hub id")


def config_files(config: Config) -> tuple[str, ...]:
    """Return the `config.json` that random weights take their dimensions from; none if `model.config` holds them."""
    if config.model.config:
        return ()
    return (str(locate(config.model, weights=False) / "config.json"),)


STAGE = Stage(
    name="checkpoint",
    run=run,
    inputs=takes(),
    sections=("model",),
    packages=("torch", "transformers"),
    files=config_files,
)
