"""What PyTorch generates in FP32, and what its components give in float64: the values that errors are counted from.

Runs first and alone: PyTorch and ONNX Runtime never hold a model at the same time.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture, Role
from accel.config.schema import Config, VerifyConfig
from accel.data import texts
from accel.data.corpus import read_texts
from accel.errors import AccelError
from accel.evaluation.component_runner import Shape, longest, script, signatures, torch_run
from accel.evaluation.rounding import Evaluator
from accel.models.checkpoints import load_model
from accel.models.generation import Generates
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.feeds import decoder_feeds
from accel.stages import prompts
from accel.stages.checkpoint import reference_files

TOKENS = "tokens.json"
CALLS, CALL = "calls.json", "call-{}.safetensors"
PATH = "path-{}.safetensors"  # what one greedy generation said, and the logits at each of its tokens
PATHS = 4
GIVEN = (  # of the section `verify`: what PyTorch is given, not how what it said is judged
    *("texts", "column", "targets", "targets_column", "batch_size", "inputs", "source_length"),
    *("max_new_tokens", "num_beams", "references", "unique_tokens", "seed"),
)
BATCH, NEW = 2, 3  # sequences and new tokens of the call with the model's own tokens
SHAPES = (Shape(1, 7, 1, 1), Shape(3, 12, 5, 1), Shape(2, 33, 2, 3))


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


@dataclass(frozen=True)
class Call:
    """One call of a component: what the caller gives it, and what it makes of that in float64.

    What it takes of other components is what they made in the calls before this one. `what`: the kind of inputs.
    """

    what: str
    role: Role
    given: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]


def calls(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    written: Sequence[Sequence[int]],
    seed: int,
) -> Iterator[tuple[str, dict[Role, Mapping[str, Tensor]]]]:
    """What the inputs are, and what the caller gives each component: random ids at `SHAPES`, then real ones.

    `written`: the ids that the model generates for each of `inputs`.
    """
    generator = torch.Generator().manual_seed(seed)
    for shape in (shape.within(longest(config)) for shape in SHAPES):
        yield f"random ids ({shape})", script(architecture, config, shape, generator)
    yield "the model's own tokens", continuation(architecture, config, inputs[:BATCH], written[:BATCH])


def continuation(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    written: Sequence[Sequence[int]],
) -> dict[Role, Mapping[str, Tensor]]:
    """What a generation gives each component: prefill all ids of `written` but the last few, the step those."""
    padding = int(getattr(config, "pad_token_id", None) or 0)
    encodes = Role.ENCODER in architecture.roles()
    shortest = min(map(len, written))
    new = max(1, min(NEW, shortest - 1))
    # Where there is an encoder, its input is what is padded, and all sequences are as long as the shortest.
    rows = texts.pad([texts.unpadded(one[:shortest] if encodes else one) for one in written], padding, left=True)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    given: dict[Role, Mapping[str, Tensor]] = {}
    if encodes:
        given[Role.ENCODER] = texts.pad(inputs, padding, left=False)
    given[Role.PREFILL] = decoder_feeds(ids[:, :-new], mask[:, :-new])
    given[Role.STEP] = decoder_feeds(ids[:, -new:], mask)
    return given


def read_calls(folder: Path) -> Iterator[Call]:
    """The calls that `run` wrote, in order."""
    for number, call in enumerate(json.loads((folder / CALLS).read_text())):
        tensors = load_file(folder / CALL.format(number))
        parts: dict[str, dict[str, Tensor]] = {"given": {}, "expected": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        yield Call(call["what"], Role(call["role"]), **parts)


@dataclass(frozen=True)
class TokenPath:
    """A greedy generation of PyTorch's in FP32: its inputs, `ids` [1, tokens], and the logits after each in float64."""

    given: Mapping[str, Tensor]
    ids: Tensor
    logits: Tensor  # [1, tokens, vocabulary]


def read_paths(folder: Path) -> Iterator[TokenPath]:
    """The paths that `run` wrote, in order."""
    for number in itertools.count():
        file = folder / PATH.format(number)
        if not file.is_file():
            return
        tensors = load_file(file)
        ids, logits = tensors.pop("ids"), tensors.pop("logits")
        yield TokenPath({name.removeprefix("given."): value for name, value in tensors.items()}, ids, logits)


def write_calls(evaluate: Evaluator, asked: Iterator[tuple[str, dict[Role, Mapping[str, Tensor]]]], out: Path) -> int:
    """Evaluate and write every call, and say how many there are."""
    described: list[dict[str, str]] = []
    for what, components in asked:
        for role, given in components.items():
            tensors = {f"given.{name}": value for name, value in given.items()}
            tensors |= {f"expected.{name}": value for name, value in evaluate(role, given).items()}
            contiguous = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
            save_file(contiguous, out / CALL.format(len(described)))
            described.append({"what": what, "role": str(role)})
    (out / CALLS).write_text(json.dumps(described))
    return len(described)


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


def along(evaluate: Evaluator, given: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits after each of `ids` [1, tokens], all seen at once: [copies, tokens, vocabulary]."""
    if Role.ENCODER in evaluate.signatures:
        evaluate(Role.ENCODER, given)
    return evaluate(Role.PREFILL, decoder_feeds(ids, torch.ones_like(ids)))["logits"].cpu().contiguous()


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
    version=4,
)
