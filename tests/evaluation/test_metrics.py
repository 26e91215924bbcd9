"""Metrics of outputs with known errors."""

import numpy as np
import pytest

from accel.errors import AccelError
from accel.evaluation import metrics

ACCEPTED = [["X Y", "X Z"], ["P Q R"], ["S"]]
ALL = list(metrics.METRICS)


def test_correct_outputs() -> None:
    """Any accepted output counts, not only the first."""
    found = metrics.scores(ALL, ["X Z", "P Q R", "S"], ACCEPTED)
    assert found["exact_match"] == 100.0
    assert found["word_error_rate"] == 0.0
    assert found["chrf"] == pytest.approx(100.0)


def test_word_edits_are_counted_to_the_nearest_reference() -> None:
    """One insertion, one deletion and one substitution, over the six words of the nearest references."""
    found = metrics.scores(["exact_match", "word_error_rate"], ["X Z Z", "P R", "T"], ACCEPTED)
    assert found == {"exact_match": 0.0, "word_error_rate": pytest.approx(100 * 3 / 6)}


def test_bleu_is_sacrebleus() -> None:
    """BLEU counts an n-gram that any reference has: precisions 6/6, 4/5, 3/4 and 2/3, no brevity penalty."""
    found = metrics.bleu(["the cat sat on the mat"], [["the cat sat on the rug", "a mat"]])
    precisions = (6 / 6) * (4 / 5) * (3 / 4) * (2 / 3)  # "mat" is in the second reference; the longer n-grams aren't
    assert found == pytest.approx(100 * precisions ** (1 / 4))


def test_loss_of_a_metric() -> None:
    """Higher error rates and fewer matches are losses; the opposite is a negative loss."""
    assert metrics.METRICS["exact_match"].loss(70.0, 72.0) == 2.0
    assert metrics.METRICS["word_error_rate"].loss(30.0, 28.0) == 2.0
    assert metrics.METRICS["bleu"].loss(30.0, 28.0) == -2.0


def test_standard_error_of_a_loss() -> None:
    """Of a mean it is that of the differences, however many both get wrong; one output changed has one of its size."""
    accepted = [["A"]] * 40
    theirs = ["A"] * 30 + ["B"] * 10
    ours = ["A"] * 22 + ["B"] * 16 + ["A"] * 2  # 8 lost, 2 gained
    loss = metrics.metric_loss("exact_match", ours, theirs, accepted)
    differences = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 30)
    assert loss.points == pytest.approx(100 * 6 / 40)
    assert loss.standard_error == pytest.approx(100 * differences.std(ddof=1) / 40**0.5)
    assert metrics.metric_loss("exact_match", theirs, theirs, accepted) == metrics.MetricLoss(0.0, 0.0)
    one = metrics.metric_loss("exact_match", ["B", *theirs[1:]], theirs, accepted)
    assert one.standard_error == pytest.approx(one.points)
    assert metrics.metric_loss("exact_match", ["B"], ["A"], [["A"]]) == metrics.MetricLoss(100.0, None)


@pytest.mark.parametrize("name", ["word_error_rate", "bleu"])
def test_standard_error_predicts_the_spread_of_samples(name: str) -> None:
    """Of metrics that are no means of their outputs; both estimates of the spread have an error of about a tenth."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in random.integers(0, 50, random.integers(4, 12))) for _ in range(100)]

    def damaged(text: str, rate: float) -> str:
        return " ".join(word if random.random() > rate else "x" for word in text.split())

    def sample() -> tuple[list[str], list[str]]:
        """Return outputs of a model with errors, and of one with more of them."""
        theirs = [damaged(text, 0.05) for text in texts]
        return [damaged(text, 0.03) for text in theirs], theirs

    accepted, metric = [[text] for text in texts], metrics.METRICS[name]
    losses = [metric.loss(*(metric.score(outputs, accepted) for outputs in sample())) for _ in range(60)]
    predicted = [metrics.metric_loss(name, *sample(), accepted).standard_error or 0.0 for _ in range(2)]
    assert np.mean(predicted) == pytest.approx(np.std(losses), rel=0.3)


@pytest.mark.parametrize(
    ("points", "error", "sure"), [(3.0, 0.9, True), (3.0, 1.1, False), (0.9, 0.0, False), (5.0, None, False)]
)
def test_loss_that_surely_exceeds_a_limit(points: float, error: float | None, sure: bool) -> None:
    """By two standard errors; with one output nothing is sure."""
    assert metrics.MetricLoss(points, error).surely_exceeds(1.0) is sure


def test_unknown_metric() -> None:
    """The message lists the existing ones."""
    with pytest.raises(AccelError, match=r"unknown metric: 'blue'.*Did you mean bleu\?.*exact_match"):
        metrics.check(["blue"])
