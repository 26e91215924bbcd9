"""Calibration batches: random ids and the user's texts, run through a model's graphs one component at a time."""

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
from accel.evaluation.component_runner import ComponentRunner, Run, Shape, component_inputs, max_positions
from accel.runtime.decoder_inputs import decoder_inputs

DECODE_STEPS = {"random": 4, "text": 32}  # kind of batch -> tokens decoded greedily after prefill's
MAX_DECODE_STEPS = max(DECODE_STEPS.values())

Call = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""(index of the batch, named inputs) -> named outputs: one call of one component."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one generation: those of the encoder, and the ids that prefill takes.

    Attributes:
        kind: "random" or "text", a key of `DECODE_STEPS`.
        encoder_inputs: Named inputs of the encoder; unused where the architecture has none.
        ids: Ids for prefill, [batch, prefix].
        mask: Attention mask of `ids`, [batch, prefix].
        rows: Description of each row, for reports.
    """

    kind: str
    encoder_inputs: Mapping[str, Tensor]
    ids: Tensor
    mask: Tensor
    rows: Sequence[str]


def batches(
    config: Config, architecture: Architecture, model: PretrainedConfig, folder: Path, prompts: Sequence[texts.Prompt]
) -> Iterator[Batch]:
    """Yield batches of random ids and of texts alternately; random ids never run out, texts do.

    The texts are those of `audit.texts`. Without that key they are the model's references or else `prompts`, in both
    cases the last first, because `verify` takes the first.

    Args:
        config: Configuration; its sections `audit` and `model` are read.
        architecture: Adapter of the model.
        model: The model's Hugging Face config.
        folder: Folder of the checkpoint.
        prompts: Prompts to fall back on.

    Raises:
        AccelError: If `audit.texts` is given and the checkpoint in `folder` has no tokenizer.
    """
    audit, references = config.audit, config.model.references
    lines: list[str] = []
    if audit.texts is not None:
        lines = [line for line in read_texts(audit.texts, audit.column) if line.strip()]
    elif references is not None:
        lines = list(texts.References.read(folder / references).texts)[::-1]
    random_batches = _random_batches(audit, architecture, model) if audit.random else iter(())
    if lines:
        text_batches = _text_batches(lines, audit, architecture, model, folder)
    else:
        text_batches = _prompt_batches(prompts[::-1], audit, architecture, model)
    while True:
        pair = []
        for source in (random_batches, text_batches):
            batch = next(source, None)
            if batch is not None:
                pair.append(batch)
        if not pair:
            return
        yield from pair


def _random_batches(config: AuditConfig, architecture: Architecture, model: PretrainedConfig) -> Iterator[Batch]:
    """Yield batches of random ids of random lengths.

    Where there is an encoder, the decoder's ids are at most a quarter as long as `audit.max_length`.
    """
    has_encoder = Component.ENCODER in architecture.components()
    generator = torch.Generator().manual_seed(config.seed)
    positions = max_positions(model)
    max_length = config.max_length
    if positions:
        max_length = min(max_length, positions - MAX_DECODE_STEPS)
    while True:
        length = _random_length(max_length, generator)
        prefix = _random_length(max_length // 4, generator)
        description = f"random ids, source length {length}"
        if has_encoder:
            description += f", {prefix} decoder tokens"
        shape = Shape(config.batch_size, length, prefix if has_encoder else length, 1)
        inputs = component_inputs(architecture, model, shape, generator)
        prefill = inputs[Component.PREFILL]
        encoder_inputs = inputs.get(Component.ENCODER, {})
        rows = [description] * config.batch_size
        yield Batch("random", encoder_inputs, prefill["input_ids"], prefill["attention_mask"], rows)


def _random_length(end: int, generator: torch.Generator) -> int:
    """Draw a length from 2 to `end` - 1 tokens."""
    return int(torch.randint(2, max(3, end), (), generator=generator))


def _text_batches(
    lines: Sequence[str], config: AuditConfig, architecture: Architecture, model: PretrainedConfig, folder: Path
) -> Iterator[Batch]:
    """Yield batches of tokenized `lines`; none if the checkpoint in `folder` has no tokenizer for its references."""
    tokenizer = texts.load_tokenizer(folder)
    if tokenizer is None:
        if config.texts is not None:
            raise AccelError(f"audit.texts={config.texts}: the checkpoint has no tokenizer to read text with")
        return
    for begin in range(0, len(lines), config.batch_size):
        batch_lines = lines[begin : begin + config.batch_size]
        rows = [f"text {number}: {line[:80]}" for number, line in enumerate(batch_lines, begin + 1)]
        yield _batch(texts.encode(tokenizer, batch_lines), architecture, model, rows)


def _prompt_batches(
    prompts: Sequence[texts.Prompt], config: AuditConfig, architecture: Architecture, model: PretrainedConfig
) -> Iterator[Batch]:
    """Yield batches of `prompts`, cut so that a decoder-only model has positions left for the decoded tokens."""
    padding = int(getattr(model, "pad_token_id", None) or 0)
    positions = max_positions(model)
    max_length = None
    if positions is not None and not model.is_encoder_decoder:
        max_length = max(1, positions - MAX_DECODE_STEPS)
    for begin in range(0, len(prompts), config.batch_size):
        batch_prompts = prompts[begin : begin + config.batch_size]
        encoded = [prompt.full_inputs(max_length) for prompt in batch_prompts]
        inputs = texts.pad(encoded, padding, left=not model.is_encoder_decoder)
        rows = [f"{prompt.kind}: {prompt.text[:80]}" for prompt in batch_prompts]
        yield _batch(inputs, architecture, model, rows)


def _batch(
    inputs: Mapping[str, Tensor], architecture: Architecture, model: PretrainedConfig, rows: Sequence[str]
) -> Batch:
    """Make a batch of encoded texts: `input_ids` and `attention_mask`, [batch, length].

    The encoder takes them if there is one, and prefill one start token; else prefill takes them.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if Component.ENCODER in architecture.components():
        start = getattr(model, "decoder_start_token_id", None) or 0
        ids = torch.full((len(ids), 1), start)
        mask = torch.ones(len(ids), 1, dtype=torch.int64)
    return Batch("text", inputs, ids, mask, rows)


def decode_greedily(runner: ComponentRunner, batch: Batch) -> None:
    """Run `DECODE_STEPS` greedy decode steps, each from the logits and caches of the one before."""
    mask = batch.mask  # [batch, prefix]
    for _ in range(DECODE_STEPS[batch.kind]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [batch, past + 1]
        next_ids = runner.values["logits"][:, -1:].argmax(-1)  # [batch, 1]
        runner(Component.DECODE, decoder_inputs(next_ids, mask))


def run_batches(
    signatures: Mapping[Component, Signature],
    batches: Sequence[Batch],
    open_component: Callable[[Component], Call],
    scratch: Path,
    first: int = 0,
    decode: Callable[[ComponentRunner, Batch], None] = decode_greedily,
    finished: Callable[[Component, int], None] = lambda component, count: None,
) -> None:
    """Run every batch through every component, with one component open at a time.

    Args:
        signatures: Signature of each component, in the order of a generation.
        batches: Batches to run.
        open_component: Opens a component's graph and returns the function that calls it.
        scratch: Folder for the files through which values pass from one component to the next.
        first: Index of the first of `batches`.
        decode: Runs the decode steps of a batch, beginning with the logits and caches of prefill.
        finished: Called after each batch with the component and the number of batches up to this one.
    """
    for component in signatures:
        _run_component(component, signatures, batches, open_component(component), scratch, first, decode, finished)


def _run_component(
    component: Component,
    signatures: Mapping[Component, Signature],
    batches: Sequence[Batch],
    call: Call,
    scratch: Path,
    first: int,
    decode: Callable[[ComponentRunner, Batch], None],
    finished: Callable[[Component, int], None],
) -> None:
    """Run every batch through one component, and store the values that the next one takes in `scratch`."""
    for index, batch in enumerate(progress.track(batches, f"running the {component}"), first):
        runner = ComponentRunner(signatures, _bind_index(call, index))
        values_file = scratch / f"{index}.safetensors"
        if values_file.is_file():
            runner.values = load_file(values_file)
        if component is Component.DECODE:
            decode(runner, batch)
            values_file.unlink()
        else:
            inputs = batch.encoder_inputs if component is Component.ENCODER else decoder_inputs(batch.ids, batch.mask)
            runner(component, inputs)
            save_file({name: tensor.contiguous() for name, tensor in runner.values.items()}, values_file)
        finished(component, index + 1)


def _bind_index(call: Call, index: int) -> Run:
    """Return `call` for batch `index`, in the form that a `ComponentRunner` takes."""

    def run(component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return call(index, inputs)

    return run
