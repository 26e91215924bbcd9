"""Quality metrics of outputs against references, in percent over a whole set of outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import AccelError, unknown
from accel.evaluation.divergence import CONFIDENCE

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
"""(outputs, accepted references of each output) -> percent."""


@dataclass(frozen=True)
class Metric:
    """A score and its direction.

    Attributes:
        score: Function that computes it.
        sign: 1 where a higher score is better, -1 where a lower one is.
    """

    score: Score
    sign: int

    def loss(self, ours: float, theirs: float) -> float:
        """Return by how many points `ours` is worse than `theirs`; negative where it is better."""
        return self.sign * (theirs - ours)


@dataclass(frozen=True)
class MetricLoss:
    """By how much a metric is worse than that of a reference, in percentage points.

    Attributes:
        points: Points; negative where it is better.
        standard_error: Standard error of `points`; None with fewer than two inputs.
    """

    points: float
    standard_error: float | None

    def __str__(self) -> str:
        """Return the points with their standard error."""
        error = "unknown" if self.standard_error is None else f"{self.standard_error:.2f}"
        return f"{self.points:.2f} percentage points (standard error {error})"

    def surely_exceeds(self, allowed: float) -> bool:
        """Return whether the loss is above `allowed` by more than `CONFIDENCE` standard errors."""
        return self.standard_error is not None and self.points - CONFIDENCE * self.standard_error > allowed


def exact_match(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Return the percentage of outputs that equal one of their references."""
    correct = sum(output in references for output, references in zip(outputs, accepted, strict=True))
    return 100 * correct / max(1, len(outputs))


def word_error_rate(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Return the edits that turn outputs into their nearest references, in percent of the references' words.

    An edit inserts, deletes or replaces a word. Edits and words are summed over all outputs before the division.
    """
    edits = words = 0
    for output, references in zip(outputs, accepted, strict=True):
        candidates = []
        for reference in references:
            reference_words = reference.split()
            candidates.append((_edit_distance(output.split(), reference_words), len(reference_words)))
        distance, length = min(candidates)
        edits += distance
        words += length
    return 100 * edits / max(1, words)


def bleu(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU as sacreBLEU computes it (M. Post, 2018, https://aclanthology.org/W18-6319)."""
    return float(_sacrebleu().BLEU().corpus_score(list(outputs), _reference_streams(accepted)).score)


def chrf(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Return chrF2 as sacreBLEU computes it (M. Popović, 2015, https://aclanthology.org/W15-3049)."""
    return float(_sacrebleu().CHRF().corpus_score(list(outputs), _reference_streams(accepted)).score)


METRICS = {
    "exact_match": Metric(exact_match, 1),
    "word_error_rate": Metric(word_error_rate, -1),
    "bleu": Metric(bleu, 1),
    "chrf": Metric(chrf, 1),
}
BY_SACREBLEU = ("bleu", "chrf")
GROUPS = 50  # of outputs, each of which is left out once to estimate a standard error


def check(names: Sequence[str]) -> None:
    """Check that the metrics `names` can be computed.

    Raises:
        AccelError: If a metric doesn't exist, or the package that computes it isn't installed.
    """
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name in BY_SACREBLEU:
            _sacrebleu()


def scores(names: Sequence[str], outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the score of each metric in `names`, in percent."""
    return {name: METRICS[name].score(outputs, accepted) for name in names}


def metric_loss(name: str, ours: Sequence[str], theirs: Sequence[str], accepted: Sequence[Sequence[str]]) -> MetricLoss:
    """Return by how much a metric of outputs is worse than that of other outputs for the same inputs.

    The outputs are compared in pairs: what both get right, or wrong in the same way, adds nothing to the standard
    error. It is the jackknife's, which holds for ratios of sums and for BLEU as for means: the difference is computed
    anew without each of up to `GROUPS` groups of inputs (P. S. Kott, The Delete-a-Group Jackknife, Journal of Official
    Statistics 17, 2001).

    Args:
        name: Name of the metric.
        ours: Outputs under test.
        theirs: Outputs of the reference.
        accepted: Accepted outputs of each input.
    """
    metric = METRICS[name]

    def points(numbers: Sequence[int]) -> float:
        """Return the loss over the inputs of these numbers."""
        rest = [accepted[number] for number in numbers]
        scored = [metric.score([outputs[number] for number in numbers], rest) for outputs in (ours, theirs)]
        return metric.loss(*scored)

    everything, groups = range(len(ours)), min(len(ours), GROUPS)
    if groups < 2:
        return MetricLoss(points(everything), None)
    without = [points([number for number in everything if number % groups != group]) for group in range(groups)]
    mean = sum(without) / groups
    variance = (groups - 1) / groups * sum((loss - mean) ** 2 for loss in without)
    return MetricLoss(points(everything), math.sqrt(variance))


def _reference_streams(accepted: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Transpose references to the form that sacreBLEU takes.

    Its first list holds the first reference of every output, its second the second, and so on; None where an output
    has no further reference.
    """
    streams: list[list[str | None]] = []
    for index in range(max(map(len, accepted))):
        streams.append([references[index] if index < len(references) else None for references in accepted])
    return streams


def _sacrebleu() -> Any:
    """Import `sacrebleu.metrics`, an optional dependency."""
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise AccelError(f"{' and '.join(BY_SACREBLEU)} need sacrebleu: pip install 'accel-onnx[metrics]'") from error
    return sacrebleu.metrics


def _edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the Levenshtein distance of two sequences of words, computed one table row at a time."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        next_row = [i]
        for j, other in enumerate(second, 1):
            deletion = row[j] + 1
            insertion = next_row[j - 1] + 1
            replacement = row[j - 1] + (word != other)
            next_row.append(min(deletion, insertion, replacement))
        row = next_row
    return row[-1]
