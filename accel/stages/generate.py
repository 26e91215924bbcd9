"""Generate text with a deployable."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from accel import console, texts
from accel.adapter import Architecture
from accel.artifacts import Artifact
from accel.errors import AccelError
from accel.generation import AcceleratedModel
from accel.loading import open_model
from accel.schema import Config
from accel.stages import Stage, takes
from accel.validation import generation_options

RESULTS = "texts.json"
BATCH = 16  # inputs at a time, unless generate.batch_size says otherwise


def lines_of(config: Config, folder: Path) -> list[str]:
    """The inputs: generate.text, generate.file, or the first references of the model. Raises `AccelError`."""
    options = config.generate
    if (text := options.get("text")) is not None:
        return [str(line) for line in (text if isinstance(text, list) else [text])]
    if (file := options.get("file")) is not None:
        return texts.read_lines(Path(str(file)))
    if config.model.references is not None:
        return list(texts.References.read(folder / config.model.references, 5).texts)
    return []


def write(
    model: AcceleratedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[str],
    options: Mapping[str, Any],
    seed: int,
    size: int,
) -> list[str]:
    """One output a line, or `num_return_sequences` of them, in order."""
    written: list[str] = []
    torch.manual_seed(seed)
    for start in console.track(range(0, len(lines), size), "generating"):
        batch = texts.encode(tokenizer, lines[start : start + size])
        ids = model.generate(**{name: tensor.to(model.device) for name, tensor in batch.items()}, **options)
        written += texts.written(model, tokenizer, batch, ids)
    return written


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `texts.json`. generate.output is a copy for the user, made anew by each run, also of reused texts."""
    folder = inputs["verify"].folder
    tokenizer = texts.load_tokenizer(folder)
    lines = lines_of(config, inputs["checkpoint"].folder)
    if tokenizer is None and lines:
        raise AccelError(f"{config.model.name} has no tokenizer, so it can't read text: stage=benchmark needs none")
    options = config.generate
    with open_model(folder, config.runtime) as model:
        written = (
            write(
                model,
                tokenizer,
                lines,
                generation_options(options),
                options.get("seed", 0),
                options.get("batch_size", BATCH),
            )
            if tokenizer is not None and lines
            else []
        )
    (out / RESULTS).write_text(json.dumps({"inputs": lines, "outputs": written}))
    return {"inputs": len(lines), "outputs": len(written)}


STAGE = Stage(
    name="generate",
    run=run,
    inputs=takes("checkpoint", "verify"),
    sections=("model", "runtime", "generate"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    files=lambda config: (str(config.generate["file"]),) if config.generate.get("file") else (),
)
