"""Quality metrics of outputs against references, in percent over a whole set of outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import AccelError, unknown

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
