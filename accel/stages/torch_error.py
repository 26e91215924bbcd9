"""How far PyTorch itself is from float64, in the precision that a candidate computes in, token by token."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.evaluation import reference_data
from accel.evaluation.component_runner import signatures, torch_run
from accel.evaluation.rounding import SAMPLES, Evaluator, root_mean_square
from accel.models.checkpoints import load_model
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

logger = logging.getLogger(__name__)

ERRORS = "errors.safetensors"


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `errors.safetensors`: the error of every token of every output, [rows, tokens], absolute.

    The name of an output is its call's number and its own: `3.logits`, or `path-0.logits`.
    """
    known, dtype = inputs["reference"].folder, getattr(torch, config.precision.dtype)
    model = load_model(inputs["checkpoint"].folder, dtype)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]
    evaluate = Evaluator(model, signatures(architecture, model.config), torch_run(architecture, model), dtype)
    errors: dict[str, Tensor] = {}
    try:
        for number, call in enumerate(progress.track(list(reference_data.read_calls(known)), "PyTorch's own error")):
            found = evaluate(call.component, call.given)
            for name, value in call.expected.items():
                errors[f"{number}.{name}"] = root_mean_square(found[name], value, SAMPLES)
        for number, path in enumerate(reference_data.read_paths(known)):
            logits = reference_data.along(evaluate, path.given, path.ids)
            errors[f"path-{number}.logits"] = root_mean_square(logits, path.logits, SAMPLES)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented for" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        logger.warning(f"PyTorch's own error in {config.precision.dtype} is unknown: {reason}")
        errors = {}
    save_file(errors, out / ERRORS)
    return {"outputs": len(errors), "samples": SAMPLES}


def read_errors(folder: Path) -> dict[str, Tensor]:
    """Output -> error of every token, as `run` wrote them."""
    return load_file(folder / ERRORS)


STAGE = Stage(
    name="torch_error",
    run=run,
    inputs=takes("checkpoint", "reference"),
    sections=("precision.dtype", "runtime.device"),
    packages=("torch", "transformers"),
)
