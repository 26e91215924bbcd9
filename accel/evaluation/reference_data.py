"""Data that `reference` writes and `verify` reads: float64 outputs of components, and logits of generated sequences."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.data import texts
from accel.evaluation.component_runner import Shape, component_inputs, max_positions
from accel.evaluation.rounding import Evaluator
from accel.runtime.decoder_inputs import decoder_inputs

CALLS, CALL = "calls.json", "call-{}.safetensors"
PATH = "path-{}.safetensors"  # a greedy generation: its inputs, ids, and the logits at each id
PATHS = 4  # generations that are written
BATCH, NEW = 2, 3  # sequences, and tokens for decode, of the call with ids that the model generated
# Tokens of each of these sequences: the first ones, which later tokens rely on (attention sinks), and the last ones.
# What all tokens do at once is compared along the generations. One sequence is shorter, so that it is padded.
FIRST, LAST, STAGGER = 8, 16, 5
SHAPES = (Shape(1, 7, 1, 1), Shape(3, 12, 5, 1), Shape(2, 33, 2, 3))


@dataclass(frozen=True)
class Call:
    """One call of a component, with its outputs in float64.

    Attributes:
        description: Description of the inputs, the same for all calls of one generation.
        component: Component to call.
        inputs: Inputs from the caller; the others are outputs of the calls before it.
        expected: Outputs in float64.
    """

    description: str
    component: Component
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]


def calls(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    generated: Sequence[Sequence[int]],
    seed: int,
) -> Iterator[tuple[str, dict[Component, Mapping[str, Tensor]]]]:
    """Yield the inputs that components are compared at: random ids at `SHAPES`, then ids that the model generated.

    Args:
        architecture: Adapter of the model.
        config: The model's Hugging Face config.
        inputs: Inputs of single generations, [1, source] each.
        generated: Ids that the model generates for each of `inputs`.
        seed: Seed of the random ids.

    Yields:
        (description, component -> the inputs that the caller gives it).
    """
    generator = torch.Generator().manual_seed(seed)
    limit = max_positions(config)
    for full_shape in SHAPES:
        shape = full_shape.within(limit)
        yield f"random ids ({shape})", component_inputs(architecture, config, shape, generator)
    yield "the model's own tokens", continuation(architecture, config, inputs[:BATCH], generated[:BATCH])


def continuation(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    generated: Sequence[Sequence[int]],
) -> dict[Component, Mapping[str, Tensor]]:
    """Return the inputs that replay parts of generations in one batch: prefill takes all but the last `NEW` ids.

    Args:
        architecture: Adapter of the model.
        config: The model's Hugging Face config.
        inputs: Inputs of single generations, [1, source] each.
        generated: Ids that the model generates for each of `inputs`, of which `FIRST` and at most `LAST` are replayed.

    Returns:
        Component -> the inputs that the caller gives it.
    """
    padding = int(getattr(config, "pad_token_id", None) or 0)
    has_encoder = Component.ENCODER in architecture.components()
    # With an encoder only its own input may be padded, so the decoder's sequences are cut to one length.
    shortest = min(map(len, generated)) if has_encoder else None
    sequences = []
    for row, sequence in enumerate(generated):
        last = LAST if has_encoder else LAST - row * STAGGER
        sequences.append(_shorten(sequence[:shortest], FIRST, last))
    new = max(1, min(NEW, min(map(len, sequences)) - 1))
    batch = texts.pad(list(map(texts.unpadded, sequences)), padding, left=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]  # [B, T]
    replay: dict[Component, Mapping[str, Tensor]] = {}
    if has_encoder:
        replay[Component.ENCODER] = texts.pad(inputs, padding, left=False)
    replay[Component.PREFILL] = decoder_inputs(ids[:, :-new], mask[:, :-new])
    replay[Component.DECODE] = decoder_inputs(ids[:, -new:], mask)
    return replay


def _shorten(sequence: Sequence[int], first: int, last: int) -> list[int]:
    """Return a sequence without the tokens between its `first` first and its `last` last ones."""
    return [*sequence[:first], *sequence[max(first, len(sequence) - last) :]]


def read_calls(folder: Path) -> Iterator[Call]:
    """Yield the calls that `write_calls` wrote into `folder`, in order."""
    for number, call in enumerate(json.loads((folder / CALLS).read_text())):
        inputs: dict[str, Tensor] = {}
        expected: dict[str, Tensor] = {}
        for name, tensor in load_file(folder / CALL.format(number)).items():
            if name.startswith("inputs."):
                inputs[name.removeprefix("inputs.")] = tensor
            else:
                expected[name.removeprefix("expected.")] = tensor
        yield Call(call["description"], Component(call["component"]), inputs, expected)


@dataclass(frozen=True)
class TokenPath:
    """A generation of PyTorch's in FP32, with its logits.

    Attributes:
        inputs: Inputs of the generation.
        ids: Ids of the decoder, [1, tokens].
        logits: Logits after each id, [1, tokens, vocabulary]: float64 of `reference`, FP32 of `text_logits`.
    """

    inputs: Mapping[str, Tensor]
    ids: Tensor
    logits: Tensor


def read_paths(folder: Path) -> Iterator[TokenPath]:
    """Yield the token paths that the stage `reference` or `text_logits` wrote into `folder`, in order."""
    for number in itertools.count():
        file = folder / PATH.format(number)
        if not file.is_file():
            return
        tensors = load_file(file)
        ids, logits = tensors.pop("ids"), tensors.pop("logits")
        yield TokenPath({name.removeprefix("inputs."): value for name, value in tensors.items()}, ids, logits)


def write_calls(
    evaluate: Evaluator, requested: Iterator[tuple[str, dict[Component, Mapping[str, Tensor]]]], out: Path
) -> int:
    """Evaluate every call and write its inputs and outputs into the folder `out`.

    Args:
        evaluate: Evaluator in float64.
        requested: Inputs as `calls` yields them.
        out: Folder to write into.

    Returns:
        Number of calls.
    """
    descriptions: list[dict[str, str]] = []
    for description, inputs_of in progress.track(requested, "components in float64", len(SHAPES) + 1):
        for component, inputs in inputs_of.items():
            tensors = {f"inputs.{name}": value for name, value in inputs.items()}
            tensors |= {f"expected.{name}": value for name, value in evaluate(component, inputs).items()}
            contiguous = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
            save_file(contiguous, out / CALL.format(len(descriptions)))
            descriptions.append({"description": description, "component": str(component)})
    (out / CALLS).write_text(json.dumps(descriptions))
    return len(descriptions)


def path_logits(evaluate: Evaluator, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits after each id, computed in one prefill.

    Args:
        evaluate: Evaluator of the model.
        inputs: Inputs of the encoder, if there is one.
        ids: Ids of the decoder, [1, tokens].

    Returns:
        Logits, [copies, tokens, vocabulary], in host memory.
    """
    if Component.ENCODER in evaluate.signatures:
        evaluate(Component.ENCODER, inputs)
    return evaluate(Component.PREFILL, decoder_inputs(ids, torch.ones_like(ids)))["logits"].cpu().contiguous()
