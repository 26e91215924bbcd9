"""Compute the reference in PyTorch: tokens generated in FP32, and component outputs and logits in float64.

PyTorch runs in a stage of its own, so that it and ONNX Runtime never hold a model at the same time.

Reads:
    The checkpoint; `prompts.json` of `prompts`; the texts and targets that `verify.texts`, `verify.targets` or
    `model.references` name.

Writes:
    `tokens.json`: the texts, the ids generated for them by each decoding method, and the outputs for the references.
    `calls.json` and `call-<n>.safetensors`: inputs and outputs of each component at a few shapes.
    `path-<n>.safetensors`: inputs, ids and logits of a greedy generation.
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
from accel.evaluation.component_runner import max_positions, signatures, torch_run
from accel.evaluation.confirmed_generation import answering, answers_by_one_call
from accel.evaluation.reference_data import PATH, PATHS, calls, path_logits, write_calls
from accel.evaluation.rounding import Evaluator
from accel.models.checkpoints import load_model
from accel.models.generation import Generates
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.stages.checkpoint import reference_files
from accel.stages.prompts import PROMPTS

TOKENS = "tokens.json"
VERIFY_KEYS = (  # of the section `verify`: those that decide what PyTorch computes, not how results are judged
    "verify.texts",
    "verify.column",
    "verify.targets",
    "verify.targets_column",
    "verify.batch_size",
    "verify.inputs",
    "verify.source_length",
    "verify.max_new_tokens",
    "verify.num_beams",
    "verify.references",
    "verify.unique_tokens",
    "verify.seed",
)
REFERENCE_BATCH = 50  # references decoded at a time


def cases(config: Config) -> dict[str, dict[str, Any]]:
    """Return the decoding methods to compare, as options of `GenerationConfig`.

    `greedy` decodes one input at a time (see `batches`), `padded` the same way in padded batches, as do `beams` and
    `sampling`. Models with random weights generate the same token over and over, which would hide a wrong cache.
    Therefore `verify.unique_tokens` defaults to true for them, and no token may occur twice.
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


def batches(name: str, count: int, batch_size: int) -> list[range]:
    """Return the batches in which a decoding method decodes `count` inputs, as ranges of input numbers.

    Only `greedy` decodes one input at a time: what a batch of one without padding can show is shown by greedy search.
    All others decode padded batches, whose decode steps take little longer than those of one input, because either
    reads every weight once. Batches also show what beams of one input can't: a reordering across inputs, and beams of
    a padded row. `padded`, which is greedy search, decodes all inputs. What the others show beyond it depends little on
    the input, so they decode half of them, but no fewer than `PATHS`.

    Args:
        name: Key of the decoding method in `cases`.
        count: Number of inputs.
        batch_size: `verify.batch_size`.
    """
    decoded = count if name == "padded" else min(count, max(PATHS, (count + 1) // 2))
    size = 1 if name == "greedy" else batch_size
    return [range(start, min(start + size, decoded)) for start in range(0, decoded, size)]


def decode_case(
    model: Generates,
    name: str,
    options: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Tensor]],
    config: VerifyConfig,
) -> list[list[int]]:
    """Generate by one decoding method for the inputs that `batches` gives it.

    Args:
        model: The PyTorch model or the deployable.
        name: Key of the decoding method in `cases`.
        options: Its options of `GenerationConfig`.
        inputs: Single inputs, [1, source] each.
        config: Section `verify`.

    Returns:
        The ids of the first inputs, without padding.
    """
    generated: list[list[int]] = []
    for batch in progress.track(batches(name, len(inputs), config.batch_size), name):
        torch.manual_seed(config.seed + batch.start)
        generated += generate_ids(model, inputs[batch.start : batch.stop], options)
    return generated


def decode_alone(
    model: Generates,
    evaluate: Evaluator,
    options: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Tensor]],
    padded: Sequence[Sequence[int]],
    out: Path,
) -> list[list[int]]:
    """Decode inputs one at a time by greedy search, and write the logits of the first `PATHS` in float64.

    Those logits are computed for the ids of the padded batch, of the input alone, without padding. Where they confirm
    every id (see `accel.evaluation.confirmed_generation`), the model isn't asked again.

    Args:
        model: The PyTorch model, in FP32.
        evaluate: Its evaluator in float64.
        options: Options of `GenerationConfig` for greedy search.
        inputs: Single inputs, [1, source] each.
        padded: The ids that the model generated by greedy search for at least these inputs, in padded batches.
        out: Folder to write `path-<n>.safetensors` into.

    Returns:
        The ids of each input.
    """
    decoded: list[list[int]] = []
    for number, single_input in enumerate(progress.track(inputs, "greedy")):
        if number >= PATHS:
            decoded += generate_ids(model, [single_input], options)
            continue
        ids = list(padded[number])
        logits = path_logits(evaluate, single_input, torch.tensor([ids]))  # [1, tokens, vocabulary]
        if not _confirms(model, logits, single_input, ids, options):
            (ids,) = generate_ids(model, [single_input], options)
            if ids != padded[number]:
                logits = path_logits(evaluate, single_input, torch.tensor([ids]))
        path = {f"inputs.{name}": tensor for name, tensor in single_input.items()}
        save_file({"ids": torch.tensor([ids]), "logits": logits, **path}, out / PATH.format(number))
        del logits  # before those of the next one are computed
        decoded.append(ids)
    return decoded


def _confirms(
    model: Generates, logits: Tensor, single_input: Mapping[str, Tensor], ids: list[int], options: Mapping[str, Any]
) -> bool:
    """Return whether `generate` picks `ids` by the logits along them, [1, ids, vocabulary]."""
    if not answers_by_one_call(model):
        return False
    with answering(model, logits):
        return generate_ids(model, [single_input], options) == [ids]


def generate_ids(
    model: Generates, inputs: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]
) -> list[list[int]]:
    """Generate for single inputs, [1, source] each, in one padded batch. Return their ids without padding.

    Beam search of transformers fills the shorter texts of a batch with the id that ends them, if that of the padding is
    0; one of those ids is left.
    """
    padding, ends = model.generation_config.pad_token_id or 0, model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    padded = texts.pad(inputs, padding, left=not model.config.is_encoder_decoder)
    batch = {name: tensor.to(model.device) for name, tensor in padded.items()}  # [batch, longest source]
    settings = GenerationConfig(**{**model.generation_config.to_diff_dict(), "max_length": None, **options})
    with torch.inference_mode():
        sequences: list[list[int]] = model.generate(**batch, generation_config=settings).tolist()
    for sequence, single in zip(sequences, inputs, strict=True):
        prompt = 1
        if not model.config.is_encoder_decoder:  # a sequence begins with the prompt, which is padded on the left
            prompt = single["input_ids"].shape[1]
            del sequence[: batch["input_ids"].shape[1] - prompt]
        while len(sequence) > 1 and sequence[-1] == padding:
            sequence.pop()
        while len(sequence) > prompt + 1 and sequence[-1] == sequence[-2] and sequence[-1] in ends:
            sequence.pop()
    return sequences


def references(config: Config, folder: Path) -> texts.References | None:
    """Read the texts and their accepted outputs, or return None where no file is named.

    Args:
        config: `verify.texts` and `verify.targets` name the files; else `model.references`.
        folder: Folder of the checkpoint, to which `model.references` is relative.
    """
    verify = config.verify
    if verify.texts is None:
        if not config.model.references:
            return None
        return texts.References.read(folder / config.model.references)
    lines = read_texts(verify.texts, verify.column)
    if verify.targets is None:
        return texts.References([line for line in lines if line.strip()], [])
    targets = read_texts(verify.targets, verify.targets_column)
    return texts.References.pair(lines, targets, (verify.texts, verify.targets))


def verification_inputs(
    config: Config,
    folder: Path,
    architecture: Architecture,
    hf_config: PretrainedConfig,
    prompts: Sequence[texts.Prompt],
) -> tuple[list[Mapping[str, Tensor]], list[str]]:
    """Return the inputs that all decoding methods share.

    They are the first references, else the first prompts, else random ids.

    Args:
        config: The configuration.
        folder: Folder of the checkpoint.
        architecture: The adapter of the model.
        hf_config: The model's Hugging Face config.
        prompts: Prompts of the stage `prompts`.

    Returns:
        Single inputs, [1, source] each, and their texts; no texts for random ids.

    Raises:
        AccelError: `verify.texts` is given, but the checkpoint has no tokenizer.
    """
    verify = config.verify
    tokenizer, examples = texts.load_tokenizer(folder), references(config, folder)
    if tokenizer is None and verify.texts is not None:
        raise AccelError(f"verify.texts={verify.texts}: the checkpoint has no tokenizer to read text with")
    if examples is None and prompts:
        max_tokens = None  # leaves positions for the new tokens, where their number is limited
        positions = None if hf_config.is_encoder_decoder else max_positions(hf_config)
        if positions is not None:
            max_tokens = max(1, positions - verify.max_new_tokens)
        first = prompts[: verify.inputs]
        return [prompt.inputs(max_tokens) for prompt in first], [prompt.text for prompt in first]
    if tokenizer is None or examples is None:
        return texts.random_inputs(architecture, hf_config, verify.inputs, verify.source_length, verify.seed), []
    lines = list(examples.texts[: verify.inputs])
    return [texts.encode(tokenizer, [line]) for line in lines], lines


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write the reference. Return the numbers of inputs, component calls and distinct tokens of greedy search."""
    folder = inputs["checkpoint"].folder
    model = load_model(folder)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]  # sampling draws from the device's own generator
    settings = config.verify
    prompts = texts.read_prompts(inputs["prompts"].folder / PROMPTS)
    model_inputs, lines = verification_inputs(config, folder, architecture, model.config, prompts)
    methods, tokens = cases(config), {}
    for name, options in progress.track([item for item in methods.items() if item[0] != "greedy"], "PyTorch in FP32"):
        tokens[name] = decode_case(model, name, options, model_inputs, settings)
    evaluate = Evaluator(model, signatures(architecture, model.config), torch_run(architecture, model), torch.float64)
    alone = model_inputs[: batches("greedy", len(model_inputs), settings.batch_size)[-1].stop]
    tokens["greedy"] = decode_alone(model, evaluate, methods["greedy"], alone, tokens["padded"], out)
    component_calls = calls(architecture, model.config, model_inputs, tokens["greedy"], settings.seed)
    count = write_calls(evaluate, component_calls, out)
    outputs = _decode_references(config, folder, model)
    (out / TOKENS).write_text(json.dumps({"texts": lines, "tokens": tokens, "references": outputs}))
    distinct = {token for ids in tokens["padded"] for token in ids}
    return {"inputs": len(model_inputs), "calls": count, "distinct_tokens": len(distinct)}


def _decode_references(config: Config, folder: Path, model: Generates) -> list[str]:
    """Return the model's outputs for the references; none without a tokenizer or accepted outputs."""
    tokenizer, examples = texts.load_tokenizer(folder), references(config, folder)
    if tokenizer is None or examples is None or not examples.accepted:
        return []
    return decode_texts(model, tokenizer, examples.texts[: config.verify.references], REFERENCE_BATCH)


def decode_texts(model: Generates, tokenizer: Any, lines: Sequence[str], batch_size: int) -> list[str]:
    """Return the greedy outputs for `lines`, under the model's own generation config."""
    outputs: list[str] = []
    for start in progress.track(range(0, len(lines), batch_size), "references"):
        batch = texts.encode(tokenizer, lines[start : start + batch_size])
        with torch.inference_mode():
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            ids = model.generate(**on_device, num_beams=1)
        outputs += texts.decode_new_tokens(model, tokenizer, batch, ids)
    return outputs


STAGE = Stage(
    name="reference",
    run=run,
    inputs=takes("checkpoint", "prompts"),
    sections=("model", "runtime.device", *VERIFY_KEYS),
    packages=("torch", "transformers"),
    files=reference_files,
)
