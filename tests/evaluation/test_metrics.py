"""What metrics say of outputs whose faults are known."""

import pytest

from accel.errors import AccelError
from accel.evaluation import metrics

ACCEPTED = [["X Y", "X Z"], ["P Q R"], ["S"]]
ALL = list(metrics.METRICS)


def test_right_outputs_are_right() -> None:
    """Any accepted output counts, not only the first."""
    found = metrics.scores(ALL, ["X Z", "P Q R", "S"], ACCEPTED)
    assert found["exact_match"] == 100.0
    assert found["word_error_rate"] == 0.0
    assert found["chrf"] == pytest.approx(100.0)


def test_edits_are_counted_to_the_nearest_in_words() -> None:
    """One insertion, one deletion, one substitution over the six words of the nearest ones."""
    found = metrics.scores(["exact_match", "word_error_rate"], ["X Z Z", "P R", "T"], ACCEPTED)
    assert found == {"exact_match": 0.0, "word_error_rate": pytest.approx(100 * 3 / 6)}


def test_bleu_is_sacrebleus() -> None:
    """Four words in order of five: precisions 5/6, 4/5, 3/4 and 2/3 (the output's own n-grams), no brevity penalty."""
    found = metrics.bleu(["the cat sat on the mat"], [["the cat sat on the rug", "a mat"]])
    precisions = (6 / 6) * (4 / 5) * (3 / 4) * (2 / 3)  # "mat" is in the second reference; the longer n-grams aren't
    assert found == pytest.approx(100 * precisions ** (1 / 4))


def test_loss_is_what_got_worse() -> None:
    """More errors and fewer matches are losses, the other way round they are gains."""
    assert metrics.METRICS["exact_match"].loss(70.0, 72.0) == 2.0
    assert metrics.METRICS["word_error_rate"].loss(30.0, 28.0) == 2.0
    assert metrics.METRICS["bleu"].loss(30.0, 28.0) == -2.0


def test_a_metric_that_does_not_exist() -> None:
    """The message lists those that do."""
    with pytest.raises(AccelError, match=r"unknown metric: 'blue'.*Did you mean bleu\?.*exact_match"):
        metrics.check(["blue"])
