"""Generate text with the deployable, from text or from speech.

Reads:
    The deployable of `verify`; the tokenizer and references of the checkpoint; the files that `generate.file` or
    `generate.audio` name.

Writes:
    `texts.json`: the inputs and the generated texts. A copy of the texts goes to the file `generate.output`.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.generation.stopping_criteria import StopStringCriteria

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
from accel.models.option_check import option_names
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

RESULTS = "texts.json"
BATCH_SIZE = 16  # unless generate.batch_size is given
DEFAULT_INPUTS = 5  # references generated for where no option names an input
TEXT_OPTIONS, SPEECH_OPTIONS = ("text", "file"), ("audio",)  # options that name inputs


def as_list(value: Any) -> list[str]:
    """Return the value of an option, one text or a list of them, as a list."""
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values]


def takes_speech(config: PretrainedConfig) -> bool:
    """Return whether the model's input is audio features."""
    return bool(model_class(config).main_input_name == "input_features")


def check(config: Config, hf_config: PretrainedConfig) -> None:
    """Check that the inputs named in `generate` suit the model.

    Raises:
        AccelError: Text is given to a speech model or audio to a text model, or the tokenizer lacks what
            `generate.chat` or `generate.stop_strings` needs.
    """
    options, name = config.generate, config.model.name
    speech = takes_speech(hf_config)
    expected = "speech: use generate.audio=FILE" if speech else "text: use generate.text or generate.file"
    for key in TEXT_OPTIONS if speech else SPEECH_OPTIONS:
        if key in options:
            raise AccelError(f"generate.{key}: {name} takes {expected}")
    if not (options.get("chat") or options.get("stop_strings")):
        return
    tokenizer: Any = texts.load_tokenizer(checkpoints.locate(config.model, weights=False))
    if options.get("chat") and (tokenizer is None or tokenizer.chat_template is None):
        raise AccelError(f"generate.chat=true: the tokenizer of {name} has no chat template")
    if options.get("stop_strings"):
        try:
            StopStringCriteria(tokenizer, as_list(options["stop_strings"]))
        except (ValueError, AttributeError) as error:  # it spells tokens behind a prefix
            raise AccelError(
                f"generate.stop_strings={options['stop_strings']}: transformers can't find strings in the output of "
                f"the tokenizer of {name}. Use generate.eos_token_id or generate.max_new_tokens"
            ) from error


def named_inputs(config: Config, folder: Path) -> list[str]:
    """Return the texts or audio paths to generate for.

    Args:
        config: `generate.text`, `generate.audio` or `generate.file` names the inputs; else `model.references`.
        folder: Folder of the checkpoint, which holds the references.
    """
    options = config.generate
    for key in ("text", "audio"):
        if options.get(key) is not None:
            return as_list(options[key])
    if options.get("file") is not None:
        return read_lines(Path(str(options["file"])))
    if config.model.references is not None:
        return list(texts.References.read(folder / config.model.references).texts[:DEFAULT_INPUTS])
    return []


def batches(
    folder: Path, hf_config: PretrainedConfig, inputs: list[str], batch_size: int, chat: bool
) -> Iterator[dict[str, Tensor]]:
    """Encode `inputs` in batches for the model's `generate`. A batch holds either short or long sounds.

    Args:
        folder: Folder of the deployable, with tokenizer and feature extractor.
        hf_config: The model's Hugging Face config.
        inputs: Texts, or paths of audio files for a speech model.
        batch_size: Inputs a batch.
        chat: Put each text into the tokenizer's chat template.

    Yields:
        Tensors by name: ids and mask, [batch, source], or audio features.

    Raises:
        AccelError: The model has no tokenizer, or a file can't be read.
    """
    tokenizer = texts.load_tokenizer(folder)
    if tokenizer is None:
        raise AccelError(
            "the model has no tokenizer, so stage=generate can't encode inputs or decode outputs. "
            "stage=benchmark needs no tokenizer"
        )
    if not takes_speech(hf_config):
        for start in range(0, len(inputs), batch_size):
            yield texts.encode(tokenizer, inputs[start : start + batch_size], chat=chat)
        return
    extractor = audio.load_extractor(folder)
    for _, group in groupby(inputs, lambda path: audio.seconds(Path(path)) > extractor.chunk_length):
        paths = list(group)
        for start in range(0, len(paths), batch_size):
            chosen = paths[start : start + batch_size]
            yield audio.encode(extractor, [audio.read(Path(path), extractor.sampling_rate) for path in chosen])


def refusals(folder: Path, hf_config: PretrainedConfig, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the sounds that are too long for the model, with the message for each.

    Args:
        folder: Folder of the deployable, with the feature extractor.
        hf_config: The model's Hugging Face config.
        options: Section `generate`. With `return_timestamps`, the model's own `generate` takes sounds of any length.
    """
    if options.get("audio") is None or options.get("return_timestamps"):
        return {}
    limit = audio.load_extractor(folder).chunk_length
    advice = "cut the file into shorter ones"
    if "return_timestamps" in option_names(hf_config):
        advice = f"set generate.return_timestamps=true, or {advice}"
    lengths = {path: audio.seconds(Path(path)) for path in as_list(options["audio"])}
    return {
        path: f"generate.audio: no output for {path}, which lasts {length:.1f} s: the model takes {limit} s at once; "
        f"{advice}"
        for path, length in lengths.items()
        if length > limit
    }


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `texts.json`. Return the numbers of inputs and outputs, and the messages for inputs that have none.

    Each input has one output, or `num_return_sequences` of them, in order.
    """
    folder, options = inputs["verify"].folder, config.generate
    refused: dict[str, str] = {}
    chosen = named_inputs(config, inputs["checkpoint"].folder)
    outputs: list[str] = []
    if chosen:
        batch_size, chat = options.get("batch_size", BATCH_SIZE), bool(options.get("chat"))
        torch.manual_seed(options.get("seed", 0))
        with open_model(folder, config.runtime) as model:
            refused = refusals(folder, model.config, options)
            chosen = [name for name in chosen if name not in refused]
            tokenizer = texts.load_tokenizer(folder)
            settings = generation_options(options)
            if "stop_strings" in settings:
                settings["tokenizer"] = tokenizer  # transformers needs it to find them
            encoded = batches(folder, model.config, chosen, batch_size, chat)
            number_of_batches = -(-len(chosen) // batch_size)  # rounded up
            for batch in progress.track(encoded, "generating", total=number_of_batches):
                on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
                generated = model.generate(**on_device, **settings)
                if model.acceptance is not None:
                    progress.note(f"assisted decoding: {model.acceptance}")
                ids = getattr(generated, "sequences", generated)  # with generate.return_dict_in_generate
                outputs += texts.decode_new_tokens(
                    model, tokenizer, batch, ids, timestamps=bool(options.get("return_timestamps"))
                )
    (out / RESULTS).write_text(json.dumps({"inputs": chosen, "outputs": outputs}))
    return {"inputs": len(chosen), "outputs": len(outputs), "refused": list(refused.values())}


def deliver(config: Config, folder: Path) -> None:
    """Write the outputs, one a line, to the file `generate.output` if it is given.

    The pipeline calls this on each run, also when it reuses the artifact in `folder`.
    """
    output = config.generate.get("output")
    if output is None:
        return
    lines = json.loads((folder / RESULTS).read_text())["outputs"]
    Path(str(output)).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    progress.note(f"{len(lines)} lines written to {output}")


def input_files(config: Config) -> tuple[str, ...]:
    """Return the input files whose content counts for the stage's key."""
    options = config.generate
    paths = []
    if options.get("file") is not None:
        paths.append(str(options["file"]))
    if options.get("audio") is not None:
        paths += as_list(options["audio"])
    return tuple(paths)


STAGE = Stage(
    name="generate",
    run=run,
    inputs=takes("checkpoint", "verify"),
    sections=("model", "runtime", "generate"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    files=input_files,
    deliver=deliver,
)
