"""Transformers' logits processors, by what they look at: that decides where a loop of ours may call them."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process


def _classes(suffix: str, *names: str) -> set[type]:
    """Those of `names` that the installed transformers has."""
    found = (getattr(logits_process, f"{name}Logits{suffix}", None) for name in names)
    return {kind for kind in found if kind is not None}


# They look at the scores alone, and ask the device nothing.
SCORES_ONLY = (
    _classes("Warper", "Temperature", "TopP", "TopK", "MinP", "Typical", "Epsilon")
    | _classes("Processor", "InfNanRemove", "SuppressTokens")
    | {logits_process.LogitNormalization}
)
# They look at how many ids there are, and change what they do once.
COUNTING = _classes("Processor", "MinLength", "MinNewTokensLength")
# They say the same whenever they are asked: one that counts its calls would notice the tokens after the end.
PURE = (
    SCORES_ONLY
    | COUNTING
    | _classes("Processor", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram", "EncoderNoRepeatNGram")
    | _classes("Processor", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken", "SuppressTokensAtBegin")
    | _classes("Warper", "TopH", "Eta")
    | {logits_process.ExponentialDecayLengthPenalty}
)


def capturable(processors: LogitsProcessorList) -> bool:
    """Whether what they do between two tokens depends on the scores and on `phase` alone."""
    return all(type(one) in SCORES_ONLY | COUNTING for one in processors)


def phase(processors: LogitsProcessorList, length: int) -> Hashable:
    """What those that count ids do when there are `length`: equal phases, equal work."""
    return tuple(_forbids_ends(one, length) for one in processors if type(one) in COUNTING)


def process(processors: LogitsProcessorList, length: int, scores: Tensor) -> Tensor:
    """What `recordable` processors say to `scores` [rows, vocabulary] after `length` ids; `scores` may be written to.

    Where ends are forbidden, that is one write here, and five passes over the vocabulary in transformers.
    """
    for one in processors:
        known: Any = one
        if type(one) not in COUNTING:
            scores = known(None, scores)
        elif _forbids_ends(one, length):
            scores.index_fill_(1, known.eos_token_id, -torch.inf)
    return scores


def _forbids_ends(one: object, length: int) -> bool:
    least = getattr(one, "min_new_tokens", getattr(one, "min_length", 0))
    return bool(length - getattr(one, "prompt_length_to_skip", 0) < least)
