"""Classification of transformers' logits processors by what they read, which decides how a decoding loop calls them."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process


def _classes(suffix: str, *names: str) -> set[type]:
    """Return the classes `<name>Logits<suffix>` that the installed transformers has."""
    classes: set[type] = set()
    for name in names:
        processor_class = getattr(logits_process, f"{name}Logits{suffix}", None)
        if processor_class is not None:
            classes.add(processor_class)
    return classes


# Read the scores only, without a host-device synchronisation.
SCORES_ONLY = (
    _classes("Warper", "Temperature", "TopP", "TopK", "MinP", "Typical", "Epsilon")
    | _classes("Processor", "InfNanRemove", "SuppressTokens")
    | {logits_process.LogitNormalization}
)
# Read the scores and the number of ids: they forbid end-of-sequence ids until a minimum length is reached.
COUNTING = _classes("Processor", "MinLength", "MinNewTokensLength")
# Return the same for the same ids and scores, however often they were called before. A processor that keeps a state
# would be disturbed by the tokens that a loop computes after the end (see `StopPoller`).
PURE = (
    SCORES_ONLY
    | COUNTING
    | _classes("Processor", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram", "EncoderNoRepeatNGram")
    | _classes("Processor", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken", "SuppressTokensAtBegin")
    | _classes("Warper", "TopH", "Eta")
    | {logits_process.ExponentialDecayLengthPenalty}
)


def capturable(processors: LogitsProcessorList) -> bool:
    """Return True if all processors can run inside a CUDA graph.

    Then their work depends on nothing but the scores and `phase`.
    """
    return all(type(processor) in SCORES_ONLY | COUNTING for processor in processors)


def phase(processors: LogitsProcessorList, length: int) -> Hashable:
    """Return a key of what the counting processors do after `length` ids: equal keys, equal operations.

    Each phase is captured as a CUDA graph of its own.
    """
    return tuple(_forbids_ends(processor, length) for processor in processors if type(processor) in COUNTING)


def process_scores(processors: LogitsProcessorList, length: int, scores: Tensor) -> Tensor:
    """Apply `capturable` processors.

    Counting processors are replaced by one write: transformers' own take five passes over the vocabulary.

    Args:
        processors: Processors for which `capturable` is true.
        length: Number of ids per sequence so far, the prompt included.
        scores: [rows, vocabulary]; may be overwritten.

    Returns:
        The processed scores, [rows, vocabulary].
    """
    for item in processors:
        processor: Any = item
        if type(processor) not in COUNTING:
            scores = processor(None, scores)
        elif _forbids_ends(processor, length):
            scores.index_fill_(1, processor.eos_token_id, -torch.inf)
    return scores


def _forbids_ends(processor: object, length: int) -> bool:
    """Return True if a counting processor forbids end-of-sequence ids after `length` ids."""
    minimum = getattr(processor, "min_new_tokens", getattr(processor, "min_length", 0))
    return bool(length - getattr(processor, "prompt_length_to_skip", 0) < minimum)
