"""Transformers' logits processors, by what they look at: that decides where a loop of ours may call them."""

from collections.abc import Callable, Hashable

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

Process = Callable[..., Tensor]
"""Ids [batch, length] and scores [batch, vocabulary] -> scores: a list of transformers' logits processors."""


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


def recordable(processors: LogitsProcessorList) -> bool:
    """Whether what they do between two tokens depends on the scores and on `phase` alone."""
    return all(type(one) in SCORES_ONLY | COUNTING for one in processors)


def phase(processors: LogitsProcessorList, length: int) -> Hashable:
    """What those that count ids do when there are `length`: equal phases, equal work."""

    def active(one: object) -> bool:
        least = getattr(one, "min_new_tokens", getattr(one, "min_length", 0))
        return bool(length - getattr(one, "prompt_length_to_skip", 0) < least)

    return tuple(active(one) for one in processors if type(one) in COUNTING)
