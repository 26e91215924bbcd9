"""Checks of rows that begin and end independently of each other: see `accel.models.rows`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accel.models.rope import angles_depend_on_length
from accel.models.rows import Rows
from accel.testing.subject import Subject

NEW_TOKENS = 9
LENGTHS = (9, 4, 13, 6)  # of the inputs, in tokens
STARTS = (0, 2, 3, 6)  # step before which each begins; the last one takes the row of the first
FIRST_LENGTH = 5  # new tokens after which the first is cut short
TOGETHER, TOGETHER_WITH_ENCODER = (2, 0, 1, 3), (2, 0)  # whose decoder prompts have one length


@dataclass
class RowSequence:
    """A sequence in a row, and what PyTorch computes for it alone.

    Attributes:
        inputs: Inputs for its prefill.
        ids: Decoder tokens until now, [1, length].
        logits: Logits of each new token, [vocabulary].
        tokens: New tokens.
    """

    inputs: dict[str, Tensor]
    ids: Tensor
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def choose(self, logits: Tensor) -> None:
        """Append the most likely token that the sequence doesn't have yet, so that a wrong cache shows."""
        allowed = logits.clone()
        allowed[self.ids[0]] = -torch.inf
        self.logits.append(logits)
        self.tokens.append(int(allowed.argmax()))
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[self.tokens[-1]]])], dim=1)


def _sequence(subject: Subject, number: int) -> RowSequence:
    """Return one of the sequences, without new tokens."""
    generator = torch.Generator().manual_seed(number)
    sample = subject.architecture.sample_inputs(subject.eager.config, 1, LENGTHS[number], generator)
    inputs = {name: value.to(subject.model.device) for name, value in sample.items()}
    if not subject.has_encoder:
        return RowSequence(inputs, inputs["input_ids"])
    ids = torch.tensor([[3 + number, 9]], device=subject.model.device)[:, : 1 + number % 2]
    return RowSequence(inputs | {"decoder_input_ids": ids}, ids)


def _alone(subject: Subject, number: int) -> RowSequence:
    """Return a sequence as PyTorch generates it alone, computing all tokens at every step."""
    sequence = _sequence(subject, number)
    for _ in range(NEW_TOKENS):
        decoder_input = {"decoder_input_ids" if subject.has_encoder else "input_ids": sequence.ids}
        mask = {} if subject.has_encoder else {"attention_mask": torch.ones_like(sequence.ids)}
        with torch.inference_mode():
            output = subject.eager(**sequence.inputs | decoder_input | mask, use_cache=False)
        sequence.choose(output.logits[0, -1].clone())
    return sequence


def _prefill_inputs(subject: Subject, model: Any, number: int, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a sequence's prefill: one prompt is padded, one is prefilled behind a prompt cache."""
    if not subject.has_encoder and number == 1:
        return _padded(inputs)
    if not subject.has_encoder and number == 2:
        return {**inputs, "past_key_values": model.cache_prompt(inputs["input_ids"][:, :7])}
    return dict(inputs)


def _padded(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a prompt with three tokens of padding before it."""
    ids = torch.nn.functional.pad(inputs["input_ids"], (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (3, 0))
    return {"input_ids": ids, "attention_mask": mask}


def _decode_together(subject: Subject, model: Any, rows: Rows) -> list[RowSequence]:
    """Return all sequences, decoded in rows that begin and end at different times."""
    sequences = [_sequence(subject, number) for number in range(len(LENGTHS))]
    running: dict[int, RowSequence] = {}
    for step in range(STARTS[-1] + NEW_TOKENS):
        if step == STARTS[0] + FIRST_LENGTH:
            row = next(row for row, sequence in running.items() if sequence is sequences[0])
            rows.release(row)
            del running[row]
        for number in (number for number, start in enumerate(STARTS) if start == step):
            row = rows.claim()
            running[row] = sequences[number]
            inputs = _prefill_inputs(subject, model, number, sequences[number].inputs)
            sequences[number].choose(rows.prefill(row, **inputs))
        unfinished = {row: sequence for row, sequence in running.items() if len(sequence.tokens) < NEW_TOKENS}
        for row in running.keys() - unfinished.keys():
            rows.release(row)
        running = unfinished
        if running:
            tokens = torch.full((rows.capacity,), -1)  # ignored in idle rows
            for row, sequence in running.items():
                tokens[row] = sequence.tokens[-1]
            logits = rows.step(tokens)
            for row, sequence in running.items():
                sequence.choose(logits[row])
    return sequences


def rows_alone(subject: Subject) -> None:
    """Check that sequences in rows at different positions, one replaced midway, are what each is alone."""
    if subject.static is None or angles_depend_on_length(subject.eager.config):
        return
    expected = [_alone(subject, number) for number in range(len(LENGTHS))]
    assert len({tuple(sequence.tokens) for sequence in expected}) == len(expected), "sequences have the same tokens"
    with subject.static.rows(capacity=3, max_length=24, source_length=max(LENGTHS)) as rows:
        found = _decode_together(subject, subject.static, rows)
        assert rows.free == rows.capacity
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        count = FIRST_LENGTH + 1 if number == 0 else NEW_TOKENS
        assert ours.tokens == theirs.tokens[: len(ours.tokens)], (number, ours.tokens, theirs.tokens)
        assert len(ours.tokens) == count, (number, len(ours.tokens), count)
        for logits, right in zip(ours.logits, theirs.logits, strict=False):
            torch.testing.assert_close(logits, right.to(logits.dtype), rtol=1e-3, atol=1e-3)


def _batch(subject: Subject, sequences: Sequence[RowSequence]) -> dict[str, Tensor]:
    """Return inputs in a batch: text is padded, beside an encoder on the right, else on the left."""
    side, batch = "right" if subject.has_encoder else "left", {}
    for name in sequences[0].inputs:
        tensors = [sequence.inputs[name] for sequence in sequences]
        if tensors[0].is_floating_point():  # features of speech, of one length
            batch[name] = torch.cat(tensors)
            continue
        batch[name] = pad_sequence([tensor[0] for tensor in tensors], batch_first=True, padding_side=side)
    if "input_ids" in batch:
        masks = [torch.ones_like(sequence.inputs["input_ids"][0]) for sequence in sequences]
        batch["attention_mask"] = pad_sequence(masks, batch_first=True, padding_side=side)
    return batch


def rows_together(subject: Subject) -> None:
    """Check that sequences of different lengths, prefilled in one padded batch, are what each is alone.

    One ends before the others. Rows are not in the order of the batch.
    """
    if subject.static is None or angles_depend_on_length(subject.eager.config):
        return
    numbers = TOGETHER_WITH_ENCODER if subject.has_encoder else TOGETHER
    expected = [_alone(subject, number) for number in numbers]
    assert len({tuple(sequence.tokens) for sequence in expected}) == len(expected), "sequences have the same tokens"
    found = [_sequence(subject, number) for number in numbers]
    with subject.static.rows(capacity=len(numbers) + 1, max_length=24, source_length=max(LENGTHS)) as rows:
        taken = [rows.claim() for _ in range(len(numbers) + 1)][:0:-1]
        for sequence, logits in zip(found, rows.prefill_together(taken, **_batch(subject, found)), strict=True):
            sequence.choose(logits)
        running = dict(zip(taken, found, strict=True))
        for step in range(NEW_TOKENS - 1):
            if step == FIRST_LENGTH:
                rows.release(taken[0])
                del running[taken[0]]
            tokens = torch.tensor([running[row].tokens[-1] if row in running else -1 for row in range(rows.capacity)])
            logits = rows.step(tokens)
            for row, sequence in running.items():
                sequence.choose(logits[row])
    for number, ours, theirs in zip(numbers, found, expected, strict=True):
        assert len(ours.tokens) == (FIRST_LENGTH + 1 if ours is found[0] else NEW_TOKENS), (number, ours.tokens)
        assert ours.tokens == theirs.tokens[: len(ours.tokens)], (number, ours.tokens, theirs.tokens)
        for logits, right in zip(ours.logits, theirs.logits, strict=False):
            torch.testing.assert_close(logits, right.to(logits.dtype), rtol=1e-3, atol=1e-3)
