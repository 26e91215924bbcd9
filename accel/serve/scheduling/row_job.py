"""A request in a row of a running batch, and which of them can have their prompts computed in one padded batch."""

from collections.abc import Iterable
from dataclasses import dataclass

from accel.models.row_prefill import RowPrefill
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.shared_prefixes import Beginning

LONGEST_TO_SHORTEST = 2  # of the prompts in a padded batch: padding takes at most as much time again
SHORT = 16  # tokens: shorter prompts count as so many, since the tokens of a short one take less time than its launch


@dataclass(eq=False)
class RowJob:
    """A request in a row of the batch.

    Attributes:
        job: The request.
        row: Its row.
        token: Its last token.
        prefill: The prefill of its prompt where that has begun and is not complete.
        beginning: How its prompt begins among others; None before that is looked up.
        running: True once its prompt is computed.
        source: Length of its input.
    """

    job: Job
    row: int
    token: int = 0
    prefill: RowPrefill | None = None
    beginning: Beginning | None = None
    running: bool = False

    def __post_init__(self) -> None:
        self.source = int(self.job.request.inputs["input_ids"].shape[1])

    @property
    def needed_length(self) -> int:
        """Number of tokens that its row must hold behind the next step, or behind its prompt and one token."""
        return self.job.sequence.length + (not self.running)  # the last token isn't in the row before it is computed

    @property
    def masked(self) -> bool:
        """True if a mask hides some of its tokens."""
        return "attention_mask" in self.job.request.inputs


def prompt_group(first: RowJob, others: Iterable[RowJob], budget: float, encoder: bool) -> list[RowJob]:
    """Return a new request, and those of others whose prompts can be computed with its own, padded to the longest.

    Masks of their own and prompts in parts don't share a batch, nor do decoder prompts of different lengths beside an
    encoder, nor lengths that are too different, as padding takes as much time as tokens.

    Args:
        first: The request.
        others: The others.
        budget: Most tokens of the batch, padding counted; the first request may have more.
        encoder: True if prompts are the inputs of an encoder.
    """
    group, shortest, longest = [first], max(first.source, SHORT), first.source
    for each in others:
        low, high = min(shortest, max(each.source, SHORT)), max(longest, each.source)
        same = not encoder or each.job.sequence.prompt_length == first.job.sequence.prompt_length
        plain = not any(one.masked or one.prefill is not None for one in (first, each))
        fits = high <= LONGEST_TO_SHORTEST * low and high * (len(group) + 1) <= budget
        if same and plain and fits:
            group, shortest, longest = [*group, each], low, high
    return group
