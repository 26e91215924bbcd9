"""How good outputs are, held against references: each metric in percent, over a whole set of outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import AccelError, unknown

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
"""(outputs, for each the outputs that count as right) -> percent."""


@dataclass(frozen=True)
class Metric:
    """`sign` is 1 where more is better, -1 where less is."""

    score: Score
    sign: int

    def loss(self, ours: float, theirs: float) -> float:
        """By how many points `ours` is worse than `theirs`; below 0 where it is better."""
        return self.sign * (theirs - ours)


def exact_match(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Outputs that are among those accepted."""
    right = sum(output in known for output, known in zip(outputs, accepted, strict=True))
    return 100 * right / max(1, len(outputs))


def word_error_rate(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Words to insert, delete or replace on the way to the nearest accepted output, over that output's words."""
    edits = words = 0
    for output, known in zip(outputs, accepted, strict=True):
        distance, length = min((_edits(output.split(), right.split()), len(right.split())) for right in known)
        edits, words = edits + distance, words + length
    return 100 * edits / max(1, words)


def bleu(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU as sacreBLEU computes it (M. Post, 2018, https://aclanthology.org/W18-6319)."""
    return float(_sacrebleu().BLEU().corpus_score(list(outputs), _streams(accepted)).score)


def chrf(outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """chrF2 as sacreBLEU computes it (M. Popović, 2015, https://aclanthology.org/W15-3049)."""
    return float(_sacrebleu().CHRF().corpus_score(list(outputs), _streams(accepted)).score)


METRICS = {
    "exact_match": Metric(exact_match, 1),
    "word_error_rate": Metric(word_error_rate, -1),
    "bleu": Metric(bleu, 1),
    "chrf": Metric(chrf, 1),
}
BY_SACREBLEU = ("bleu", "chrf")


def check(names: Sequence[str]) -> None:
    """Raises `AccelError` on a metric that doesn't exist, or whose package isn't installed."""
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name in BY_SACREBLEU:
            _sacrebleu()


def scores(names: Sequence[str], outputs: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metric -> percent."""
    return {name: METRICS[name].score(outputs, accepted) for name in names}


def _streams(accepted: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacreBLEU takes them: one list a choice, None where an output has no further one."""
    return [
        [known[place] if place < len(known) else None for known in accepted] for place in range(max(map(len, accepted)))
    ]


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise AccelError(f"{' and '.join(BY_SACREBLEU)} need sacrebleu: pip install 'accel-onnx[metrics]'") from error
    return sacrebleu.metrics


def _edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
