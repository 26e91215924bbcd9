"""How many tokens of an assistant the model accepted, in assisted and prompt-lookup decoding."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Acceptance:
    """Counts of one generation, in assisted decoding as in https://arxiv.org/abs/2211.17192.

    Attributes:
        steps: Calls of the model.
        candidates: Tokens that were proposed to it.
        accepted: Those among them that it would have chosen itself.
    """

    steps: int = 0
    candidates: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Share of the candidates that were accepted."""
        return self.accepted / self.candidates if self.candidates else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens per call of the model, its own one included."""
        return 1 + self.accepted / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.rate:.0%} of {self.candidates} candidate tokens accepted, "
            f"{self.tokens_per_step:.2f} tokens a decode step"
        )


def count_acceptance(generator: Any) -> Acceptance:
    """Count what one of transformers' candidate generators proposes from now on, and what is accepted."""
    counts = Acceptance()
    get, update = generator.get_candidates, generator.update_candidate_strategy

    def get_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = get(input_ids, *args, **kwargs)
        counts.candidates += found[0].shape[1] - input_ids.shape[1]
        return found

    def update_candidate_strategy(input_ids: Any, scores: Any, num_matches: Any) -> Any:
        counts.steps += 1
        counts.accepted += int(num_matches)
        return update(input_ids, scores, num_matches)

    generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
    return counts
