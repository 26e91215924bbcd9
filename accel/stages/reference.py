"""What PyTorch generates in FP32, and what its components give in float64: the values that errors are counted from.

Runs first and alone: PyTorch and ONNX Runtime never hold a model at the same time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import Config, VerifyConfig
from accel.data import texts
from accel.data.corpus import read_texts
from accel.errors import AccelError
from accel.evaluation.component_runner import longest, signatures, torch_run
from accel.evaluation.reference_data import PATH, PATHS, along, calls, write_calls
from accel.evaluation.rounding import Evaluator
from accel.models.checkpoints import load_model
from accel.models.generation import Generates
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.stages import prompts
from accel.stages.checkpoint import reference_files

TOKENS = "tokens.json"
GIVEN = (  # of the section `verify`: what PyTorch is given, not how what it said is judged
    *("texts", "column", "targets", "targets_column", "batch_size", "inputs", "source_length"),
    *("max_new_tokens", "num_beams", "references", "unique_tokens", "seed"),
)


def cases(config: Config) -> dict[str, dict[str, Any]]:
    """The decoding methods compared, as options of `GenerationConfig`. `padded` runs the inputs in one batch.

    Random weights say one token over and over, which would hide a wrong cache: there, no token may come twice.
    """
    verify = config.verify
    unique = config.model.weights == "random" if verify.unique_tokens is None else verify.unique_tokens
    common: dict[str, Any] = {"max_new_tokens": verify.max_new_tokens, "do_sample": False, "num_beams": 1}
    if unique:
        common["no_repeat_ngram_size"] = 1
    return {
        "greedy": common,
        "beams": common | {"num_beams": verify.num_beams},
        "sampling": common | {"do_sample": True, "top_k": 0, "temperature": 1.0},
        "padded": common,
    }


def decode_case(
    model: Generates,
    name: str,
    options: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Tensor]],
    config: VerifyConfig,
) -> list[list[int]]:
    """The generated ids of every input under one case, without padding."""
    size = config.batch_size if name == "padded" else 1
    found: list[list[int]] = []
    for start in range(0, len(inputs), size):
        torch.manual_seed(config.seed + start)
        found += generate_ids(model, inputs[start : start + size], options)
    return found


def generate_ids(
    model: Generates, inputs: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]
) -> list[list[int]]:
    """Generate for single inputs in one padded batch; ids after the last that is not padding are dropped."""
    padding = model.generation_config.pad_token_id or 0
    padded = texts.pad(inputs, padding, left=not model.config.is_encoder_decoder)
    batch = {name: tensor.to(model.device) for name, tensor in padded.items()}
    settings = GenerationConfig(**{**model.generation_config.to_diff_dict(), "max_length": None, **options})
    with torch.inference_mode():
        sequences: list[list[int]] = model.generate(**batch, generation_config=settings).tolist()
    for sequence in sequences:
        while len(sequence) > 1 and sequence[-1] == padding:
            sequence.pop()
    return sequences


def references(config: Config, folder: Path) -> texts.References | None:
    """What `verify.texts` and `verify.targets` name, or else `model.references` in the checkpoint's folder."""
    verify = config.verify
    if verify.texts is None:
        return texts.References.read(folder / config.model.references) if config.model.references else None
    lines = read_texts(verify.texts, verify.column)
    if verify.targets is None:
        return texts.References([line for line in lines if line.strip()], [])
    targets = read_texts(verify.targets, verify.targets_column)
    return texts.References.pair(lines, targets, (verify.texts, verify.targets))


def fixed_inputs(
    config: Config,
    folder: Path,
    architecture: Architecture,
    description: PretrainedConfig,
    asked: Sequence[texts.Prompt],
) -> tuple[list[Mapping[str, Tensor]], list[str]]:
    """The inputs of every case, and their texts: the first references or prompts, or random ids without text."""
    verify = config.verify
    tokenizer, known = texts.load_tokenizer(folder), references(config, folder)
    if tokenizer is None and verify.texts is not None:
        raise AccelError(f"verify.texts={verify.texts}: the checkpoint has no tokenizer to read text with")
    if known is None and asked:
        positions = None if description.is_encoder_decoder else longest(description)
        most = None if positions is None else max(1, positions - verify.max_new_tokens)
        first = asked[: verify.inputs]
        return [prompt.inputs(most) for prompt in first], [prompt.text for prompt in first]
    if tokenizer is None or known is None:
        return texts.random_inputs(architecture, description, verify.inputs, verify.source_length, verify.seed), []
    lines = list(known.texts[: verify.inputs])
    return [texts.encode(tokenizer, [line]) for line in lines], lines


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes the tokens of every case, what every component gives at a few shapes, logits along tokens, and texts."""
    folder = inputs["checkpoint"].folder
    model = load_model(folder)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]  # sampling draws from the device's own generator
    settings = config.verify
    asked = texts.read_prompts(inputs["prompts"].folder / prompts.PROMPTS)
    chosen, lines = fixed_inputs(config, folder, architecture, model.config, asked)
    compared = cases(config)
    tokens = {
        name: decode_case(model, name, options, chosen, settings)
        for name, options in progress.track(list(compared.items()), "PyTorch, FP32")
    }
    evaluate = Evaluator(model, signatures(architecture, model.config), torch_run(architecture, model), torch.float64)
    said = tokens["greedy"]
    count = write_calls(evaluate, calls(architecture, model.config, chosen, said, settings.seed), out)
    for number, (given, ids) in enumerate(zip(chosen[:PATHS], said[:PATHS], strict=True)):
        logits = along(evaluate, given, torch.tensor([ids]))
        path = {"ids": torch.tensor([ids]), "logits": logits} | {f"given.{name}": one for name, one in given.items()}
        save_file(path, out / PATH.format(number))
    (out / TOKENS).write_text(
        json.dumps({"texts": lines, "tokens": tokens, "references": _references(config, folder, model)})
    )
    return {"inputs": len(chosen), "calls": count, "distinct_tokens": len({i for ids in said for i in ids})}


def _references(config: Config, folder: Path, model: Generates) -> list[str]:
    tokenizer, known = texts.load_tokenizer(folder), references(config, folder)
    if tokenizer is None or known is None or not known.accepted:
        return []
    return decode_texts(model, tokenizer, known.texts[: config.verify.references], batch_size=50)


def decode_texts(model: Generates, tokenizer: Any, lines: Sequence[str], batch_size: int) -> list[str]:
    """Greedy outputs for `lines` under the model's own generation config, in order."""
    outputs: list[str] = []
    for start in progress.track(range(0, len(lines), batch_size), "references"):
        batch = texts.encode(tokenizer, lines[start : start + batch_size])
        with torch.inference_mode():
            ids = model.generate(**{name: tensor.to(model.device) for name, tensor in batch.items()}, num_beams=1)
        outputs += texts.written(model, tokenizer, batch, ids)
    return outputs


STAGE = Stage(
    name="reference",
    run=run,
    inputs=takes("checkpoint", "prompts"),
    sections=("model", "runtime.device", *(f"verify.{key}" for key in GIVEN)),
    packages=("torch", "transformers"),
    files=reference_files,
)
