"""What a model is looked at with: batches of random ids and of a user's texts, run through its graphs role by role."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture, Component, Signature
from accel.config.schema import AuditConfig, Config
from accel.data import texts
from accel.data.corpus import read_texts
from accel.errors import AccelError
from accel.evaluation.component_runner import ComponentRunner, Shape, component_inputs, longest
from accel.runtime.decoder_inputs import decoder_inputs

STEPS = {"random": 4, "text": 32}  # tokens decoded greedily after the first

Call = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""(number of the batch, named inputs) -> named outputs: one run of one role."""


@dataclass(frozen=True)
class Batch:
    """What the encoder is given, if there is one, and the first ids of the decoder; `rows` says what each row is."""

    kind: str
    given: Mapping[str, Tensor]
    ids: Tensor  # [batch, prefix]
    mask: Tensor  # [batch, prefix]
    rows: Sequence[str]


def batches(
    config: Config, architecture: Architecture, model: PretrainedConfig, folder: Path, asked: Sequence[texts.Prompt]
) -> Iterator[Batch]:
    """Random ids and texts by turns; random ids have no end, texts have.

    The texts are those of `audit.texts`, or else the model's references or the prompts `asked`, the last first, because
    `verify` takes the first. Raises `AccelError` if texts are named and the checkpoint in `folder` has no tokenizer.
    """
    audit, references = config.audit, config.model.references
    lines: list[str] = []
    if audit.texts is not None:
        lines = [line for line in read_texts(audit.texts, audit.column) if line.strip()]
    elif references is not None:
        lines = list(texts.References.read(folder / references).texts)[::-1]
    random = _random(audit, architecture, model) if audit.random else iter(())
    written = _written(lines, audit, architecture, model, folder)
    if not lines:
        written = _prompted(asked[::-1], audit, architecture, model)
    while True:
        found = [batch for source in (random, written) if (batch := next(source, None)) is not None]
        yield from found
        if not found:
            return


def _random(config: AuditConfig, architecture: Architecture, model: PretrainedConfig) -> Iterator[Batch]:
    """Random ids of random lengths; at most a quarter of them is given to the decoder where there is an encoder."""
    encodes = Component.ENCODER in architecture.components()
    generator = torch.Generator().manual_seed(config.seed)
    room = (longest(model) or config.max_length + STEPS["random"]) - STEPS["random"]
    most = min(config.max_length, room)
    while True:
        length, prefix = (int(torch.randint(2, max(3, n), (), generator=generator)) for n in (most, most // 4))
        shape = Shape(config.batch_size, length, prefix if encodes else length, 1)
        given = component_inputs(architecture, model, shape, generator)
        first = given[Component.PREFILL]
        what = f"random ids, source length {length}" + (f", {prefix} first tokens" if encodes else "")
        rows = [what] * config.batch_size
        yield Batch("random", given.get(Component.ENCODER, {}), first["input_ids"], first["attention_mask"], rows)


def _written(
    lines: Sequence[str], config: AuditConfig, architecture: Architecture, model: PretrainedConfig, folder: Path
) -> Iterator[Batch]:
    tokenizer = texts.load_tokenizer(folder) if lines else None
    if tokenizer is None:
        if config.texts is not None:
            raise AccelError(f"audit.texts={config.texts}: the checkpoint has no tokenizer to read text with")
        return
    for begin in range(0, len(lines), config.batch_size):
        chosen = lines[begin : begin + config.batch_size]
        rows = [f"text {begin + place}: {text[:80]}" for place, text in enumerate(chosen, 1)]
        yield _batch(texts.encode(tokenizer, chosen), architecture, model, rows)


def _prompted(
    asked: Sequence[texts.Prompt], config: AuditConfig, architecture: Architecture, model: PretrainedConfig
) -> Iterator[Batch]:
    padding = int(getattr(model, "pad_token_id", None) or 0)
    known = longest(model)
    room = None if known is None or model.is_encoder_decoder else max(1, known - STEPS["text"])
    for begin in range(0, len(asked), config.batch_size):
        chosen = asked[begin : begin + config.batch_size]
        given = texts.pad([prompt.cut(room) for prompt in chosen], padding, left=not model.is_encoder_decoder)
        yield _batch(given, architecture, model, [f"{prompt.kind}: {prompt.text[:80]}" for prompt in chosen])


def _batch(
    given: Mapping[str, Tensor], architecture: Architecture, model: PretrainedConfig, rows: Sequence[str]
) -> Batch:
    """Texts for the encoder, and one first token for the decoder; or, without an encoder, for the decoder."""
    ids, mask = given["input_ids"], given["attention_mask"]
    if Component.ENCODER in architecture.components():
        start = getattr(model, "decoder_start_token_id", None) or 0
        ids, mask = torch.full((len(ids), 1), start), torch.ones(len(ids), 1, dtype=torch.int64)
    return Batch("text", given, ids, mask, rows)


def walk(
    signatures: Mapping[Component, Signature],
    work: Sequence[Batch],
    opened: Callable[[Component], Call],
    scratch: Path,
    first: int = 0,
) -> None:
    """Run every batch through every role, one role open at a time. Values pass from role to role through files.

    After the decoder's first call come greedy steps, each from the logits and caches of the one before.
    `first`: the number of the first batch of `work`.
    """
    for component in signatures:
        call = opened(component)
        for number, batch in enumerate(progress.track(work, f"the {component}'s values"), first):
            runner = ComponentRunner(signatures, lambda _, inputs, number=number, call=call: call(number, inputs))  # type: ignore
            spool = scratch / f"{number}.safetensors"
            runner.pool = load_file(spool) if spool.is_file() else {}
            if component is Component.ENCODER:
                runner(component, batch.given)
            elif component is Component.PREFILL:
                runner(component, decoder_inputs(batch.ids, batch.mask))
            else:
                _decode(runner, batch)
                spool.unlink()
                continue
            save_file({name: tensor.contiguous() for name, tensor in runner.pool.items()}, spool)
        del call


def _decode(runner: ComponentRunner, batch: Batch) -> None:
    """Greedy steps from prefill's logits and caches on."""
    mask = batch.mask
    for _ in range(STEPS[batch.kind]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        runner(Component.DECODE, decoder_inputs(runner.pool["logits"][:, -1:].argmax(-1), mask))
