"""Measure PyTorch's own error against float64, in a precision like that of the graphs, token by token.

Reads:
    The checkpoint; `call-<n>.safetensors` and `path-<n>.safetensors` of `reference`.

Writes:
    `errors.safetensors`: one tensor an output, or none where PyTorch lacks a kernel for the precision.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import Config, PrecisionConfig
from accel.evaluation import reference_data
from accel.evaluation.component_runner import signatures, torch_run
from accel.evaluation.rounding import SAMPLES, Evaluator, root_mean_square
from accel.models.checkpoints import load_model
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

logger = logging.getLogger(__name__)

ERRORS = "errors.safetensors"


def comparable_dtype(precision: PrecisionConfig) -> str:
    """Return the dtype in which PyTorch rounds about as coarsely as graphs in `precision`.

    Beside weights in low bits, whose products round activations to 8 bits, that is bfloat16, which has 8 significant
    bits, and not the FP32 of the values in between.
    """
    return "bfloat16" if precision.weight_bits is not None and precision.dtype == "float32" else precision.dtype


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `errors.safetensors`. Return the number of outputs, and of evaluations that each error is the mean of.

    A tensor [rows, tokens] holds the absolute error of each token of an output. Its key is the number of the component
    call and the output's name, as in `3.logits`; for logits along a generation, `path-0.logits`.
    """
    folder, dtype = inputs["reference"].folder, getattr(torch, comparable_dtype(config.precision))
    model = load_model(inputs["checkpoint"].folder, dtype)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]
    evaluate = Evaluator(model, signatures(architecture, model.config), torch_run(architecture, model), dtype)
    calls, count = reference_data.read_calls(folder), inputs["reference"].summary["calls"]
    errors: dict[str, Tensor] = {}
    try:
        for number, call in enumerate(progress.track(calls, "PyTorch's own error", count)):
            outputs = evaluate(call.component, call.inputs)
            for name, expected in call.expected.items():
                errors[f"{number}.{name}"] = root_mean_square(outputs[name], expected, SAMPLES)
        for number, path in enumerate(reference_data.read_paths(folder)):
            logits = reference_data.path_logits(evaluate, path.inputs, path.ids)
            errors[f"path-{number}.logits"] = root_mean_square(logits, path.logits, SAMPLES)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented for" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        logger.warning(f"PyTorch's own error in {dtype} is unknown: {reason}")
        errors = {}
    save_file(errors, out / ERRORS)
    return {"outputs": len(errors), "samples": SAMPLES}


def read_errors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the `errors.safetensors` in `folder`: key -> absolute error of each token."""
    return load_file(folder / ERRORS)


STAGE = Stage(
    name="torch_error",
    run=run,
    inputs=takes("checkpoint", "reference"),
    sections=("precision.dtype", "precision.weight_bits", "runtime.device"),
    packages=("torch", "transformers"),
)
