"""Generate text with a deployable, from text or from speech."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture
from accel.config.generate_options import generation_options
from accel.config.schema import Config
from accel.data import audio, texts
from accel.data.corpus import read_lines
from accel.errors import AccelError
from accel.models import checkpoints
from accel.models.loading import open_model
from accel.models.model_class import model_class
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

RESULTS = "texts.json"
BATCH = 16  # inputs at a time, unless generate.batch_size says otherwise
WRITTEN, SPOKEN = ("text", "file"), ("audio",)  # options that name inputs


def listed(value: Any) -> list[str]:
    """An option that takes one text or a list of them."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def listens(config: PretrainedConfig) -> bool:
    """Whether the model takes speech."""
    return bool(model_class(config).main_input_name == "input_features")


def check(config: Config, description: PretrainedConfig) -> None:
    """Raises `AccelError` where the inputs named are not what the model takes, or it knows no chat."""
    options, name = config.generate, config.model.name
    wrong = [key for key in (WRITTEN if listens(description) else SPOKEN) if key in options]
    if wrong:
        right = "speech: generate.audio=FILE" if listens(description) else "text: generate.text or generate.file"
        raise AccelError(f"generate.{wrong[0]}: {name} takes {right}")
    if options.get("chat"):
        tokenizer = texts.load_tokenizer(checkpoints.locate(config.model, weights=False))
        if tokenizer is None or tokenizer.chat_template is None:
            raise AccelError(f"generate.chat=true: the tokenizer of {name} has no chat template")


def named_inputs(config: Config, folder: Path) -> list[str]:
    """The inputs: those that an option names, or the first references of the model."""
    options = config.generate
    for key in ("text", "audio"):
        if options.get(key) is not None:
            return listed(options[key])
    if options.get("file") is not None:
        return read_lines(Path(str(options["file"])))
    if config.model.references is not None:
        return list(texts.References.read(folder / config.model.references).texts[:5])
    return []


def batches(
    folder: Path, description: PretrainedConfig, inputs: list[str], size: int, chat: bool
) -> Iterator[dict[str, Tensor]]:
    """What `generate` takes for `inputs`, `size` of them at a time. Raises `AccelError` if they can't be read."""
    tokenizer = texts.load_tokenizer(folder)
    if tokenizer is None:
        raise AccelError("the model has no tokenizer, so it can't read or write text: stage=benchmark needs none")
    extractor = audio.load_extractor(folder) if listens(description) else None
    for start in range(0, len(inputs), size):
        chosen = inputs[start : start + size]
        if extractor is not None:
            yield audio.encode(extractor, [audio.read(Path(path), extractor.sampling_rate) for path in chosen])
        else:
            yield texts.encode(tokenizer, chosen, chat=chat)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `texts.json`. generate.output is a copy for the user, made anew by each run, also of reused texts.

    Every input gives one output, or `num_return_sequences` of them, in order.
    """
    folder, options = inputs["verify"].folder, config.generate
    chosen = named_inputs(config, inputs["checkpoint"].folder)
    written: list[str] = []
    if chosen:
        size, chat = options.get("batch_size", BATCH), bool(options.get("chat"))
        torch.manual_seed(options.get("seed", 0))
        with open_model(folder, config.runtime) as model:
            tokenizer = texts.load_tokenizer(folder)
            groups = batches(folder, model.config, chosen, size, chat)
            for batch in progress.track(groups, "generating", total=-(-len(chosen) // size)):
                given = {name: tensor.to(model.device) for name, tensor in batch.items()}
                ids = model.generate(**given, **generation_options(options))
                written += texts.written(model, tokenizer, batch, ids)
    (out / RESULTS).write_text(json.dumps({"inputs": chosen, "outputs": written}))
    return {"inputs": len(chosen), "outputs": len(written)}


def deliver(config: Config, folder: Path) -> None:
    """Write the outputs, one a line, to the file that `generate.output` names, if it does."""
    output = config.generate.get("output")
    if output is None:
        return
    lines = json.loads((folder / RESULTS).read_text())["outputs"]
    Path(str(output)).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    progress.note(f"{len(lines)} lines written to {output}")


def input_files(config: Config) -> tuple[str, ...]:
    """The files whose content counts."""
    options = config.generate
    file = (str(options["file"]),) if options.get("file") is not None else ()
    return (*file, *(listed(options["audio"]) if options.get("audio") is not None else ()))


STAGE = Stage(
    name="generate",
    run=run,
    inputs=takes("checkpoint", "verify"),
    sections=("model", "runtime", "generate"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    files=input_files,
    deliver=deliver,
)
