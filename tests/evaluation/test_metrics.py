"""Metrics of outputs with known errors."""

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


def test_unknown_metric() -> None:
    """The message lists the existing ones."""
    with pytest.raises(AccelError, match=r"unknown metric: 'blue'.*Did you mean bleu\?.*exact_match"):
        metrics.check(["blue"])
