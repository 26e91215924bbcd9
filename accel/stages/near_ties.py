"""Which sequences that differ from PyTorch's do so at a near tie of PyTorch's own: a part of `verify`, in low bits.

A near tie is what the trials take for one: a change that needs no more divergence from PyTorch's distribution than
`precision.max_divergence` allows on average (`accel.evaluation.divergence.change_divergence`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel import progress
from accel.config.schema import Config
from accel.evaluation.divergence import change_divergence
from accel.evaluation.prescribed_generation import score_text
from accel.evaluation.verification_result import VerificationResult
from accel.models.checkpoints import load_model
from accel.stages import reference

GATED = ("greedy", "beams", "padded")  # not sampling, which draws other tokens at the smallest difference


@dataclass(frozen=True)
class DifferingSequence:
    """A generated sequence that isn't PyTorch's.

    Attributes:
        method: Decoding method: see `accel.stages.reference.cases`.
        number: Number of the input.
        ours: Ids of the deployable.
        theirs: Ids of PyTorch.
    """

    method: str
    number: int
    ours: Sequence[int]
    theirs: Sequence[int]

    @property
    def key(self) -> str:
        """Name of the sequence in a verification result."""
        return f"{self.method}.{self.number}"

    @property
    def position(self) -> int:
        """Position of the first id that differs; if one sequence begins with the other, the shorter length."""
        for position, (token, torch_token) in enumerate(zip(self.ours, self.theirs, strict=False)):
            if token != torch_token:
                return position
        return min(len(self.ours), len(self.theirs))


def count_near_ties(
    config: Config,
    folder: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    differing: Sequence[DifferingSequence],
    verification: VerificationResult,
) -> None:
    """Record in `verification` which of the differing sequences are near ties, by PyTorch's model in FP32.

    To be called when the deployable is closed, so that it and PyTorch's model aren't in memory together.

    Args:
        config: The configuration.
        folder: Folder of the checkpoint.
        inputs: The inputs of all decoding methods, [1, source] each.
        differing: Sequences that differ, of methods without random choice.
        verification: Updated in place.
    """
    verification.near_tie, verification.near_ties = config.precision.max_divergence, dict.fromkeys(GATED, 0)
    if not differing:
        return
    model = load_model(folder)
    model.to(device=config.runtime.device)  # type: ignore[call-arg]
    methods = reference.cases(config)
    for sequence in progress.track(differing, "near ties"):
        options, single_input = methods[sequence.method], inputs[sequence.number]
        needed = needed_divergence(model, single_input, options, sequence)
        verification.needed_divergence[sequence.key] = needed
        verification.near_ties[sequence.method] += verification.is_near_tie(sequence.key)


def needed_divergence(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], options: Mapping[str, Any], sequence: DifferingSequence
) -> float:
    """Return by how much PyTorch's distribution has to change for the other sequence to be as good as its own.

    Greedy search chooses between two ids at the first position that differs, by the probabilities that PyTorch gives
    them there. Beam search chooses between texts by their scores. The odds of two texts are taken for those of two ids
    that have no others beside them, which is the strictest reading: with the texts' own probabilities, as small as they
    are, almost any two texts would be nearly tied.

    Args:
        model: PyTorch's model.
        inputs: The input, [1, source].
        options: Options of the decoding method.
        sequence: The sequence.

    Returns:
        Nats; 0 where beam search found a text that PyTorch scores as high as its own or higher.
    """
    if options["num_beams"] == 1:
        position = sequence.position
        scored = score_text(model, inputs, options, sequence.theirs[:position], position)
        both = [scored.at(position, _id_at(model, ids, position)) for ids in (sequence.theirs, sequence.ours)]
    else:
        margin = _beam_margin(model, inputs, options, sequence)
        both = [-math.log1p(math.exp(-margin)), -math.log1p(math.exp(margin))]  # of odds exp(margin) to 1
        if margin <= 0:
            return 0.0
    likeliest, other = torch.tensor(both, dtype=torch.float64).exp()
    return float(change_divergence(likeliest, other))


def _beam_margin(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], options: Mapping[str, Any], sequence: DifferingSequence
) -> float:
    """Return by how many nats PyTorch's sequence has a higher score of beam search than the other one.

    The score is the sum of log-probabilities, divided by a power of the number of new ids. The difference of scores is
    multiplied by that power for the longer sequence: it is that of the sums for sequences of one length.
    """
    penalty = 1.0 if model.generation_config.length_penalty is None else model.generation_config.length_penalty
    scores, lengths = list[float](), list[int]()
    for ids in (sequence.theirs, sequence.ours):
        scored = score_text(model, inputs, options, ids, len(ids))
        ended = len(ids) - scored.start < options["max_new_tokens"]
        complete = [*ids, *_stripped_end(model)] if ended else list(ids)
        total = sum(scored.at(position, complete[position]) for position in range(scored.start, len(complete)))
        lengths.append(len(complete) - scored.start)
        scores.append(total / float(lengths[-1] ** penalty))
    return (scores[0] - scores[1]) * float(max(lengths) ** penalty)


def _stripped_end(model: PreTrainedModel) -> list[int]:
    """Return the id that ends a sequence, where `reference.generate_ids` removes it as padding; else nothing."""
    ends, padding = model.generation_config.eos_token_id, model.generation_config.pad_token_id or 0
    return [padding] if padding in (ends if isinstance(ends, list) else [ends]) else []


def _id_at(model: PreTrainedModel, ids: Sequence[int], position: int) -> int:
    """Return the id at a position; after the last one the id that ended the sequence."""
    return ids[position] if position < len(ids) else int(model.generation_config.pad_token_id or 0)
