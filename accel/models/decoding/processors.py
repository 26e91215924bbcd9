"""Transformers' logits processors: which of them the loops support, and which are filters of the engine's choice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from accel.engine.operations.choice import FORBID, LOG_SOFTMAX, Filter


def _classes(suffix: str, *names: str) -> set[type]:
    """Return the classes `<name>Logits<suffix>` that the installed transformers has."""
    classes: set[type] = set()
    for name in names:
        processor_class = getattr(logits_process, f"{name}Logits{suffix}", None)
        if processor_class is not None:
            classes.add(processor_class)
    return classes


def _filter(name: str, attribute: str) -> Callable[[Any], Filter]:
    """Return a function from a processor to the filter that does the same, with its `attribute` as the value."""

    def convert(processor: Any) -> Filter:
        least = getattr(processor, "min_tokens_to_keep", 1)
        return Filter(name, getattr(processor, attribute), least, getattr(processor, "filter_value", -torch.inf))

    return convert


# Processors that read the scores only, as filters.
FILTERS: dict[type, Callable[[Any], Filter]] = {
    logits_process.TemperatureLogitsWarper: _filter("temperature", "temperature"),
    logits_process.TopKLogitsWarper: _filter("top k", "top_k"),
    logits_process.TopPLogitsWarper: _filter("top p", "top_p"),
    logits_process.MinPLogitsWarper: _filter("min p", "min_p"),
    logits_process.TypicalLogitsWarper: _filter("typical p", "mass"),
    logits_process.EpsilonLogitsWarper: _filter("least probability", "epsilon"),
    logits_process.InfNanRemoveLogitsProcessor: lambda _: Filter("finite"),
    logits_process.LogitNormalization: lambda _: LOG_SOFTMAX,
}
# Processors that forbid ids, always or until the sequences have a length -> the attribute that holds the ids.
FORBIDDING = {
    logits_process.SuppressTokensLogitsProcessor: "suppress_tokens",
    logits_process.SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    logits_process.MinLengthLogitsProcessor: "eos_token_id",
    logits_process.MinNewTokensLengthLogitsProcessor: "eos_token_id",
}
# Return the same for the same ids and scores, however often they were called before. A processor that keeps a state
# would be disturbed by the tokens that a loop computes after the end (see `StopPoller`).
PURE = (
    FILTERS.keys()
    | FORBIDDING.keys()
    | _classes("Processor", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram", "EncoderNoRepeatNGram")
    | _classes("Processor", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken")
    | _classes("Warper", "TopH", "Eta")
    | {logits_process.ExponentialDecayLengthPenalty}
)
ALWAYS = 2**62  # more than any number of ids


def score_filters(processors: LogitsProcessorList) -> tuple[Filter, ...] | None:
    """Return the filters that do what logits processors do, if all of these read the scores only; else None."""
    if any(type(processor) not in FILTERS for processor in processors):
        return None
    return tuple(FILTERS[type(processor)](processor) for processor in processors)


def as_filters(
    processors: LogitsProcessorList, prompt_length: int, vocabulary: int, device: torch.device
) -> tuple[tuple[Filter, ...], Tensor] | None:
    """Return the filters that do what logits processors do, without reading a value from the device.

    Args:
        processors: The processors, in order.
        prompt_length: Number of ids before the first one that is chosen.
        vocabulary: Number of scores in a row.
        device: Device of the scores.

    Returns:
        The filters and, for each one that forbids ids, from which number of chosen ids on each id is allowed,
        int64 [forbidding filters, vocabulary]. Processors next to each other that forbid ids are one filter.
        None if a processor is no filter, for example because it reads the ids.
    """
    filters: list[Filter] = []
    allowed_from: list[Tensor] = []
    for processor in processors:
        if type(processor) in FILTERS:
            filters.append(FILTERS[type(processor)](processor))
            continue
        until = _forbidden_until(processor, prompt_length) if type(processor) in FORBIDDING else None
        if until is None:
            return None
        forbidden = getattr(processor, FORBIDDING[type(processor)]).to(device)
        numbers = torch.isin(torch.arange(vocabulary, device=device), forbidden) * until
        if filters and filters[-1].name == FORBID:
            allowed_from[-1] = torch.maximum(allowed_from[-1], numbers)
        else:
            filters.append(Filter(FORBID))
            allowed_from.append(numbers)
    none = torch.empty(0, vocabulary, dtype=torch.int64, device=device)
    return tuple(filters), torch.stack(allowed_from) if allowed_from else none


def _forbidden_until(processor: Any, prompt_length: int) -> int | None:
    """Return how many ids are chosen before a processor of `FORBIDDING` allows its ids; None for another rule."""
    match processor:
        case logits_process.MinLengthLogitsProcessor():
            return processor.min_length - prompt_length
        case logits_process.MinNewTokensLengthLogitsProcessor():
            return processor.min_new_tokens + processor.prompt_length_to_skip - prompt_length
        case logits_process.SuppressTokensAtBeginLogitsProcessor():
            if processor.begin_index > prompt_length:  # allowed before, too
                return None
            return int(processor.begin_index == prompt_length)
    return ALWAYS
