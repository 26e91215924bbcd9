"""Logits that a runtime computes while `generate` runs, recorded for comparison."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.protocol import Runtime


@dataclass
class RecordedGeneration:
    """Calls of one generation.

    Attributes:
        tokens: Ids that the prefill and each decode step were given, [batch, new].
        prefill: Logits of the prompt, [batch, kept, vocabulary]: those of its last token at least.
        steps: Logits of each decode step, [batch, new, vocabulary].
        state: Caches after the last step.
    """

    tokens: list[Tensor]
    prefill: Tensor
    steps: list[Tensor]
    state: Any


@contextmanager
def recording(runtime: Runtime[Any], most: int) -> Iterator[list[RecordedGeneration | None]]:
    """Open a context in which every prefill and the decode steps after it are recorded as one generation.

    Steps that choose the next ids themselves (`Runtime.decode_and_select`) have no logits and are missing.

    Args:
        runtime: The runtime that `generate` calls.
        most: Generations to keep; for later ones the list holds None.
    """
    generations: list[RecordedGeneration | None] = []
    prefill, decode, patched = runtime.prefill, runtime.decode, vars(runtime)

    def recorded_prefill(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        logits, state = prefill(inputs)
        tokens = [inputs["input_ids"].clone()]
        generations.append(RecordedGeneration(tokens, logits, [], state) if len(generations) < most else None)
        return logits, state

    def recorded_decode(inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        logits = decode(inputs, state)
        current = generations[-1] if generations else None
        if current is not None and current.state is state:
            current.steps.append(logits)
            current.tokens.append(inputs["input_ids"].clone())  # the loop writes the next ids there
        return logits

    patched |= {"prefill": recorded_prefill, "decode": recorded_decode}
    try:
        yield generations
    finally:
        del patched["prefill"], patched["decode"]


def logits_along(runtime: Runtime[Any], generation: RecordedGeneration, ids: Tensor, prompt: int) -> Tensor | None:
    """Return the logits of a recorded generation after each token.

    A generation needs no logits within the prompt, nor after the last token: both are computed now.

    Args:
        runtime: The runtime that was recorded.
        generation: Generation of one sequence, of these ids.
        ids: All ids of the sequence, [1, tokens].
        prompt: Number of tokens of the prompt; one beside an encoder.

    Returns:
        Logits, [1, tokens, vocabulary]; None where those of a step are missing, or the decoder was given other tokens,
        such as Whisper's first ones, which its `generate` doesn't return.
    """
    steps, mask = list(generation.steps), torch.ones_like(ids)
    following = ids.shape[1] - prompt
    given = torch.cat(generation.tokens, dim=1)
    singly = [each.shape[1] for each in generation.tokens] == [prompt] + [1] * len(steps)
    complete = len(steps) in (following - 1, following)
    if not singly or not complete or not torch.equal(given, ids[:, : given.shape[1]]):
        return None
    if len(steps) < following:
        steps.append(runtime.decode(decoder_inputs(ids[:, -1:], mask), generation.state))
    within: list[Tensor] = []
    if prompt > 1:
        logits, _ = runtime.prefill(decoder_inputs(ids[:, :prompt], mask[:, :prompt]))
        within = [logits[:, :-1]]
    return torch.cat([*within, generation.prefill[:, -1:], *steps], dim=1)
