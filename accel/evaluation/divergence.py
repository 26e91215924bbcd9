"""Distance of next-token distributions from a reference, and how well a number of tokens determines its mean."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOKENS_AT_ONCE = 32  # whose distributions are computed in float64: a row of logits can take a megabyte
CONFIDENCE = 2.0  # standard errors around a mean within which the mean over all such texts is taken to lie, about 95%


@dataclass
class Divergence:
    """Kullback-Leibler divergence of the next token's distribution from a reference, in nats, over tokens of texts.

    The tokens of one text depend on each other. So the standard error of the mean is computed from the sums over the
    texts, as for a sample of clusters (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, section 6.3: the ratio
    of two sums). With a single text it is computed from the tokens.

    Attributes:
        tokens: Tokens compared.
        changed: Those at which another id is the likeliest.
        texts: Text -> its divergences, one for each token.
    """

    tokens: int = 0
    changed: int = 0
    texts: dict[Hashable, list[float]] = field(default_factory=dict)

    def add(self, text: Hashable, found: Tensor, expected: Tensor) -> None:
        """Add tokens of a text.

        Args:
            text: Name of the text; tokens that were added under the same name before belong to it, too.
            found: Logits under test, [tokens, vocabulary]. The divergence is infinite where one isn't finite.
            expected: Logits of the reference, same shape.
        """
        values = self.texts.setdefault(text, [])
        for start in range(0, len(expected), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            block, reference = found[rows].cpu().double(), expected[rows].cpu().double()
            self.changed += int((block.argmax(-1) != reference.argmax(-1)).sum())
            each = torch.nn.functional.kl_div(
                block.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
            ).sum(-1)  # [tokens]
            values += each.nan_to_num(math.inf, math.inf).clamp_min(0).tolist()
        self.tokens += len(expected)

    @property
    def mean(self) -> float:
        """Mean divergence in nats; 0 without tokens."""
        return sum(map(sum, self.texts.values())) / max(1, self.tokens)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, in nats; infinite where the mean is, or with fewer than two tokens."""
        mean = self.mean
        samples = list(self._samples())
        if not math.isfinite(mean) or len(samples) < 2:
            return math.inf
        squares = sum((total - tokens * mean) ** 2 for total, tokens in samples)
        return math.sqrt(squares * len(samples) / (len(samples) - 1)) / self.tokens

    def _samples(self) -> Iterator[tuple[float, int]]:
        """Yield sum and number of the divergences of each text, or of each token of the only one."""
        groups = [values for values in self.texts.values() if values]
        if len(groups) == 1:
            groups = [[value] for value in groups[0]]
        for values in groups:
            yield sum(values), len(values)
