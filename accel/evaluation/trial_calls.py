"""Calls of the FP32 graphs that trials of weight formats compare quantized graphs with: enough tokens, in few calls."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from accel.adapters.types import Component, Signature
from accel.evaluation.calibration_data import DECODE_STEPS, MAX_DECODE_STEPS, Batch, run_batches
from accel.evaluation.component_runner import ComponentRunner
from accel.evaluation.sensitivity import RecordedCall, Recorder
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.layout import IDS, MASK
from accel.runtime.session import SessionSettings

TEXT = "text"  # kind of calibration batches whose tokens count; at random ids near ties are common
TOKENS = 512  # that trials compare, at least, unless the texts run out; along greedy search see `record_calls`
ROW_TOKENS = 128  # of a row of prefill that count, at most, evenly spaced
ONE_TOKEN_STEPS = (0,)  # decode steps of one token that are recorded; all others are in the call with all tokens


class ReplayedDecode:
    """Decode steps that generate two continuations, and then compute each in one call, from prefill's caches again.

    One is sampled at temperature 1, because the likeliest tokens alone would not show errors at rarer ones: over texts
    that a model samples, the mean divergence of a token is the divergence of its texts. The other is that of greedy
    search, for the tokens that change in it.

    Args:
        recorder: Recorder of the calls, which is told which of them are greedy.
        counted: Kind of batches whose tokens count, which get `MAX_DECODE_STEPS`.
        end_tokens: Ids that end a text. Steps end when all rows of a batch of texts have.
        seed: Seed of the sampling.
    """

    def __init__(self, recorder: Recorder, counted: str, end_tokens: Sequence[int], seed: int) -> None:
        self._recorder, self._counted = recorder, counted
        self._ends = torch.tensor(end_tokens, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, runner: ComponentRunner, batch: Batch) -> None:
        """Run the steps, starting from prefill's logits and caches in `runner.values`."""
        start = dict(runner.values)
        for greedy in (False, True):
            self._recorder.greedy = greedy
            runner.values = dict(start)
            ids, mask = self._generate(runner, batch, greedy)
            runner.values = dict(start)
            runner(Component.DECODE, decoder_inputs(ids, mask))
        self._recorder.greedy = False

    def _generate(self, runner: ComponentRunner, batch: Batch, greedy: bool) -> tuple[Tensor, Tensor]:
        """Return the ids of a continuation, [batch, new], and its attention mask, [batch, prefix + new]."""
        ids, mask = batch.ids[:, :0], batch.mask
        steps = MAX_DECODE_STEPS if batch.kind == self._counted else DECODE_STEPS[batch.kind]
        while True:
            logits = runner.values["logits"][:, -1].float()  # [batch, vocabulary]
            if greedy:
                next_ids = logits.argmax(-1, keepdim=True)  # [batch, 1]
            else:
                next_ids = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)
            ids = torch.cat([ids, next_ids], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            ended = batch.kind == TEXT and bool(torch.isin(ids, self._ends).any(1).all())
            if ended or ids.shape[1] == steps:
                return ids, mask
            runner(Component.DECODE, decoder_inputs(next_ids, mask))


def counted_tokens(component: Component, kind: str, inputs: Mapping[str, Tensor], end_tokens: Sequence[int]) -> Tensor:
    """Return which tokens of a recorded call of a decoder count for the divergence: bool [rows, new].

    Those of prefill, padding excepted, at most `ROW_TOKENS` of a row; and those of the call with all tokens of a
    continuation, up to the end of the text.

    Args:
        component: Prefill or decode.
        kind: Kind of the batch.
        inputs: Inputs of the call.
        end_tokens: Ids that end a text.
    """
    ids = inputs[IDS]
    if component is Component.DECODE:
        if ids.shape[1] == 1:
            return torch.zeros_like(ids, dtype=torch.bool)
        ended = torch.isin(ids, torch.tensor(end_tokens, dtype=torch.int64)).cumsum(1) > 0
        return ~ended if kind == TEXT else torch.ones_like(ended)
    counted = inputs[MASK][:, -ids.shape[1] :].bool() if MASK in inputs else torch.ones_like(ids, dtype=torch.bool)
    for row in counted:
        positions = row.nonzero()[:, 0]
        if len(positions) > ROW_TOKENS:
            row.zero_()
            row[positions[torch.linspace(0, len(positions) - 1, ROW_TOKENS).long()]] = True
    return counted


def record_calls(
    specs: Mapping[Component, Signature],
    first: Sequence[Batch],
    more: Iterator[Batch],
    graphs: Path,
    settings: SessionSettings,
    scratch: Path,
    end_tokens: Sequence[int],
    max_batches: int,
    greedy_tokens: int,
) -> Recorder:
    """Run the FP32 graphs and record their calls, until enough tokens count.

    Enough are `TOKENS` that are not of greedy search, and `greedy_tokens` that are.

    Args:
        specs: Signature of each component.
        first: Batches that are run in any case.
        more: Batches of the kind whose tokens count, to go on with.
        graphs: Folder of the FP32 graphs.
        settings: Settings of their sessions.
        scratch: Folder for the recorded calls.
        end_tokens: Ids that end a text.
        max_batches: Largest number of batches.
        greedy_tokens: Tokens of greedy search that are needed.
    """
    recorder = Recorder(scratch, [batch.kind for batch in first], ONE_TOKEN_STEPS)
    kind = counted_kind(recorder.kinds)
    decode = ReplayedDecode(recorder, kind, end_tokens, seed=0)
    needed = {False: TOKENS, True: greedy_tokens}  # of the other tokens, and of greedy search
    work, done = list(first), 0
    while work:
        run_batches(
            specs, work, lambda each: recorder.open(each, graphs / f"{each}.onnx", settings), scratch, done, decode
        )
        done += len(work)
        tokens = dict.fromkeys(needed, 0)
        for component, call in _decoder_calls(recorder, kind):
            tokens[call.greedy] += _count(component, call, end_tokens)
        batches = max(1, recorder.kinds.count(kind))
        missing = max(math.ceil((needed[key] - count) * batches / max(1, count)) for key, count in tokens.items())
        work = list(islice(more, max(0, min(missing, max_batches - done))))
        recorder.kinds = [*recorder.kinds, *(batch.kind for batch in work)]
    return recorder


def counted_kind(kinds: Sequence[str]) -> str:
    """Return the kind of batch whose tokens count: texts, or any kind where there are none."""
    return TEXT if TEXT in kinds or not kinds else kinds[0]


def _decoder_calls(recorder: Recorder, kind: str) -> Iterator[tuple[Component, RecordedCall]]:
    """Yield the calls of the decoder's components for batches of one kind."""
    for component, calls in recorder.calls.items():
        if component is not Component.ENCODER:
            yield from ((component, call) for call in calls if call.kind == kind)


def _count(component: Component, call: RecordedCall, end_tokens: Sequence[int]) -> int:
    """Return how many tokens of a recorded call count."""
    return int(counted_tokens(component, call.kind, call.inputs(), end_tokens).sum())
