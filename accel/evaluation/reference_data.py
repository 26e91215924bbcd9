"""What `reference` writes and `verify` reads: components' outputs in float64, and logits along generated tokens."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from accel.adapters.types import Architecture, Component
from accel.data import texts
from accel.evaluation.component_runner import Shape, component_inputs, longest
from accel.evaluation.rounding import Evaluator
from accel.runtime.decoder_inputs import decoder_inputs

CALLS, CALL = "calls.json", "call-{}.safetensors"
PATH = "path-{}.safetensors"  # what one greedy generation said, and the logits at each of its tokens
PATHS = 4
BATCH, NEW = 2, 3  # sequences and new tokens of the call with the model's own tokens
SHAPES = (Shape(1, 7, 1, 1), Shape(3, 12, 5, 1), Shape(2, 33, 2, 3))


@dataclass(frozen=True)
class Call:
    """One call of a component: what the caller gives it, and what it makes of that in float64.

    What it takes of other components is what they made in the calls before this one. `what`: the kind of inputs.
    """

    what: str
    component: Component
    given: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]


def calls(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    written: Sequence[Sequence[int]],
    seed: int,
) -> Iterator[tuple[str, dict[Component, Mapping[str, Tensor]]]]:
    """What the inputs are, and what the caller gives each component: random ids at `SHAPES`, then real ones.

    `written`: the ids that the model generates for each of `inputs`.
    """
    generator = torch.Generator().manual_seed(seed)
    for shape in (shape.within(longest(config)) for shape in SHAPES):
        yield f"random ids ({shape})", component_inputs(architecture, config, shape, generator)
    yield "the model's own tokens", continuation(architecture, config, inputs[:BATCH], written[:BATCH])


def continuation(
    architecture: Architecture,
    config: PretrainedConfig,
    inputs: Sequence[Mapping[str, Tensor]],
    written: Sequence[Sequence[int]],
) -> dict[Component, Mapping[str, Tensor]]:
    """What a generation gives each component: prefill all ids of `written` but the last few, the step those."""
    padding = int(getattr(config, "pad_token_id", None) or 0)
    encodes = Component.ENCODER in architecture.components()
    shortest = min(map(len, written))
    new = max(1, min(NEW, shortest - 1))
    # Where there is an encoder, its input is what is padded, and all sequences are as long as the shortest.
    rows = texts.pad([texts.unpadded(one[:shortest] if encodes else one) for one in written], padding, left=True)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    given: dict[Component, Mapping[str, Tensor]] = {}
    if encodes:
        given[Component.ENCODER] = texts.pad(inputs, padding, left=False)
    given[Component.PREFILL] = decoder_inputs(ids[:, :-new], mask[:, :-new])
    given[Component.DECODE] = decoder_inputs(ids[:, -new:], mask)
    return given


def read_calls(folder: Path) -> Iterator[Call]:
    """The calls that `run` wrote, in order."""
    for number, call in enumerate(json.loads((folder / CALLS).read_text())):
        tensors = load_file(folder / CALL.format(number))
        parts: dict[str, dict[str, Tensor]] = {"given": {}, "expected": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        yield Call(call["what"], Component(call["component"]), **parts)


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


def write_calls(
    evaluate: Evaluator, asked: Iterator[tuple[str, dict[Component, Mapping[str, Tensor]]]], out: Path
) -> int:
    """Evaluate and write every call, and say how many there are."""
    described: list[dict[str, str]] = []
    for what, components in asked:
        for component, given in components.items():
            tensors = {f"given.{name}": value for name, value in given.items()}
            tensors |= {f"expected.{name}": value for name, value in evaluate(component, given).items()}
            contiguous = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
            save_file(contiguous, out / CALL.format(len(described)))
            described.append({"what": what, "component": str(component)})
    (out / CALLS).write_text(json.dumps(described))
    return len(described)


def along(evaluate: Evaluator, given: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits after each of `ids` [1, tokens], all seen at once: [copies, tokens, vocabulary]."""
    if Component.ENCODER in evaluate.signatures:
        evaluate(Component.ENCODER, given)
    return evaluate(Component.PREFILL, decoder_inputs(ids, torch.ones_like(ids)))["logits"].cpu().contiguous()
