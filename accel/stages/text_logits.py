"""Compute PyTorch's logits along texts, in FP32: what `verify` compares next-token distributions in low bits with.

Reads:
    The checkpoint; `prompts.json` of `prompts`; the texts that `verify.texts` or `model.references` name.

Writes:
    `path-<n>.safetensors`: inputs, ids and logits of one text each: prompt and sampled continuation, or beside an
    encoder what is sampled for a source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config
from accel.data import texts
from accel.evaluation.component_runner import ComponentRunner, signatures, torch_run
from accel.evaluation.reference_data import PATH
from accel.evaluation.trial_calls import TOKENS
from accel.models.checkpoints import load_model
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.decoder_inputs import decoder_inputs
from accel.stages import reference
from accel.stages.checkpoint import reference_files
from accel.stages.prompts import PROMPTS

TEXTS = 64  # at most
BATCH = 8  # texts that are continued at a time
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_beams": 1}


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write the logits of as many texts as have `TOKENS` tokens together. Return the numbers of texts and tokens.

    Continuations are sampled at temperature 1, for the reason that `accel.evaluation.trial_calls.ReplayedDecode` gives.
    """
    folder = inputs["checkpoint"].folder
    model = load_model(folder)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]
    prompts = texts.read_prompts(inputs["prompts"].folder / PROMPTS)
    many = replace(config, verify=replace(config.verify, inputs=TEXTS))
    model_inputs, _ = reference.verification_inputs(many, folder, architecture, model.config, prompts)
    options = {**SAMPLING, "max_new_tokens": config.verify.max_new_tokens}
    runner = ComponentRunner(signatures(architecture, model.config), torch_run(architecture, model))
    written = tokens = 0
    for start in progress.track(range(0, len(model_inputs), BATCH), "texts in PyTorch"):
        batch = model_inputs[start : start + BATCH]
        torch.manual_seed(config.verify.seed + start)
        for single_input, ids in zip(batch, reference.generate_ids(model, batch, options), strict=True):
            path = {f"inputs.{name}": tensor for name, tensor in single_input.items()}
            path |= {"ids": torch.tensor([ids]), "logits": _logits(runner, single_input, ids, model.device)}
            save_file(path, out / PATH.format(written))
            written, tokens = written + 1, tokens + len(ids)
        if tokens >= TOKENS:
            break
    return {"texts": written, "tokens": tokens}


def _logits(runner: ComponentRunner, inputs: Mapping[str, Tensor], ids: Sequence[int], device: torch.device) -> Tensor:
    """Return the logits after each id, [1, tokens, vocabulary], computed in one prefill."""
    if Component.ENCODER in runner.signatures:
        runner(Component.ENCODER, {name: tensor.to(device) for name, tensor in inputs.items()})
    sequence = torch.tensor([ids], device=device)
    logits = runner(Component.PREFILL, decoder_inputs(sequence, torch.ones_like(sequence)))["logits"]
    return logits.cpu().contiguous()


STAGE = Stage(
    name="text_logits",
    run=run,
    inputs=takes("checkpoint", "prompts"),
    sections=(
        "model",
        "runtime.device",
        "verify.texts",
        "verify.column",
        "verify.targets",
        "verify.targets_column",
        "verify.source_length",
        "verify.max_new_tokens",
        "verify.seed",
    ),
    packages=("torch", "transformers"),
    files=reference_files,
)
