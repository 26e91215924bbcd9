"""Distance of next-token distributions from a reference, and how well a number of tokens determines it."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOKENS_AT_ONCE = 32  # whose distributions are computed in float64: a row of logits can take a megabyte
CONFIDENCE = 2.0  # standard errors around a mean within which the mean over all such texts is taken to lie, about 95%


@dataclass
class TextMeans:
    """Mean of a number for each token of texts, with its standard error.

    The tokens of one text depend on each other. So the standard error of the mean is computed from the sums over the
    texts, as for a sample of clusters (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, section 6.3: the ratio
    of two sums). With a single text it is computed from the tokens.

    Attributes:
        texts: Text -> its numbers, one for each token.
    """

    texts: dict[Hashable, list[float]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.texts.values()))

    @property
    def total(self) -> float:
        """Sum over the tokens."""
        return sum(map(sum, self.texts.values()))

    @property
    def mean(self) -> float:
        """Mean over the tokens; 0 without any."""
        return self.total / max(1, self.tokens)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; infinite where the mean is, or with fewer than two tokens."""
        mean, tokens = self.mean, self.tokens
        samples = list(self._samples())
        if not math.isfinite(mean) or len(samples) < 2:
            return math.inf
        squares = sum((total - count * mean) ** 2 for total, count in samples)
        return math.sqrt(squares * len(samples) / (len(samples) - 1)) / tokens

    def _samples(self) -> Iterator[tuple[float, int]]:
        """Yield sum and number of the tokens of each text, or of each token of the only one."""
        groups = [values for values in self.texts.values() if values]
        if len(groups) == 1:
            groups = [[value] for value in groups[0]]
        for values in groups:
            yield sum(values), len(values)


@dataclass
class Divergence:
    """Kullback-Leibler divergence of the next token's distribution from a reference, in nats, over tokens of texts.

    Attributes:
        divergences: Of each token.
        change_divergences: Of each token, what `change_divergence` returns where another id is the likeliest, else 0.
        changed: Tokens at which another id is the likeliest.
    """

    divergences: TextMeans = field(default_factory=TextMeans)
    change_divergences: TextMeans = field(default_factory=TextMeans)
    changed: int = 0

    def add(self, text: Hashable, found: Tensor, expected: Tensor) -> None:
        """Add tokens of a text.

        Args:
            text: Name of the text; tokens that were added under the same name before belong to it, too.
            found: Logits under test, [tokens, vocabulary]. The divergence is infinite where one isn't finite.
            expected: Logits of the reference, same shape.
        """
        divergences = self.divergences.texts.setdefault(text, [])
        change_divergences = self.change_divergences.texts.setdefault(text, [])
        for start in range(0, len(expected), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            block = found[rows].cpu().double().log_softmax(-1)  # [tokens, vocabulary]
            reference = expected[rows].cpu().double().log_softmax(-1)
            each = torch.nn.functional.kl_div(block, reference, reduction="none", log_target=True).sum(-1)
            divergences += each.nan_to_num(math.inf, math.inf).clamp_min(0).tolist()
            likeliest = block.argmax(-1, keepdim=True)  # [tokens, 1]
            expected_likeliest = reference.argmax(-1, keepdim=True)
            self.changed += int((likeliest != expected_likeliest).sum())
            change_divergences += change_divergence(
                reference.gather(-1, expected_likeliest).exp(), reference.gather(-1, likeliest).exp()
            )[:, 0].tolist()

    @property
    def tokens(self) -> int:
        """Number of tokens compared."""
        return self.divergences.tokens

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.divergences.texts)

    @property
    def mean(self) -> float:
        """Mean divergence in nats; 0 without tokens."""
        return self.divergences.mean

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, in nats: see `TextMeans`."""
        return self.divergences.standard_error

    def clear_changes(self, limit: float) -> TextMeans:
        """Return 1 for each token that changed though all distributions within `limit` nats keep it, else 0.

        A change that needs no more divergence than is allowed is a near tie of the reference, which any rounding
        decides.
        """
        texts = self.change_divergences.texts
        return TextMeans({text: [float(value > limit) for value in values] for text, values in texts.items()})


def change_divergence(likeliest: Tensor, other: Tensor) -> Tensor:
    """Return the smallest divergence from a reference at which another id is as likely as the reference's likeliest.

    Of all distributions with that property the nearest one gives both ids their mean, and leaves the others as they are
    (the reference's projection onto that set: I. Csiszar, I-Divergence Geometry of Probability Distributions and
    Minimization Problems, 1975, https://doi.org/10.1214/aop/1176996454). Where both are likely, that is about
    (p + q) m^2 / 8 for a margin of m nats between them.

    Args:
        likeliest: Probability p that the reference gives its likeliest id, any shape.
        other: Probability q that it gives the other id, same shape.

    Returns:
        p ln(2p / (p + q)) + q ln(2q / (p + q)) in nats, same shape; 0 where both are equal.
    """
    mean = (likeliest + other) / 2
    return torch.xlogy(likeliest, likeliest / mean) + torch.xlogy(other, other / mean)


def share_bound(changes: TextMeans) -> float:
    """Return an upper bound of the share of tokens that change in all such texts, from 0 to 1.

    It is Wilson's bound at `CONFIDENCE` standard errors, with the number of independent tokens that has the same
    standard error as these (C. Franco, R. J. A. Little, T. A. Louis, E. V. Slud, Comparative Study of Confidence
    Intervals for Proportions in Complex Sample Surveys, 2019, https://pmc.ncbi.nlm.nih.gov/articles/PMC6690503). So
    none of 196 tokens shows that at most 2% change, and one of 32 that at most 16% do.

    Args:
        changes: 1 for each token that changed, else 0.
    """
    share, tokens = changes.mean, float(changes.tokens)
    if not tokens:
        return 1.0
    spread = share * (1 - share)  # variance of one token
    if changes.standard_error**2 * tokens > spread > 0:
        tokens = spread / changes.standard_error**2
    square = CONFIDENCE**2 / tokens
    return min(1.0, (share + square / 2 + math.sqrt(square * spread + square**2 / 4)) / (1 + square))


def least_tokens(share: float) -> int:
    """Return the number of tokens of which none may change to show that at most `share` of all do: see `share_bound`.

    Args:
        share: From 0 to 1.

    Returns:
        The number; 0 for a share of 0, which no number shows.
    """
    return math.ceil(CONFIDENCE**2 * (1 - share) / share) if share else 0
