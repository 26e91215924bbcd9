"""Divergence of next-token distributions: its mean, and the standard error that says how well texts determine it."""

import math

import pytest
import torch

from accel.evaluation.divergence import TOKENS_AT_ONCE, Divergence


def logits(*values: float) -> torch.Tensor:
    """Logits [1, vocabulary] of the distribution with these probabilities."""
    return torch.tensor([values]).log()


def test_divergence_of_known_distributions() -> None:
    """From the reference to what is under test, in nats; independent of a constant added to the logits."""
    divergence = Divergence()
    divergence.add("a", logits(0.5, 0.5) + 3, logits(0.25, 0.75))
    divergence.add("a", logits(0.2, 0.8), logits(0.2, 0.8))
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence.texts["a"] == pytest.approx([expected, 0], abs=1e-7)
    assert divergence.mean == pytest.approx(expected / 2)
    assert (divergence.tokens, divergence.changed) == (2, 1)  # at 0.5 and 0.5 the first is the likeliest


def test_tokens_are_compared_in_blocks_of_which_none_is_lost() -> None:
    """The result is that of all tokens at once."""
    generator = torch.Generator().manual_seed(0)
    found, expected = torch.randn(2, 2 * TOKENS_AT_ONCE + 3, 7, generator=generator)
    divergence = Divergence()
    divergence.add(0, found, expected)
    together = torch.nn.functional.kl_div(
        found.double().log_softmax(-1), expected.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert divergence.texts[0] == pytest.approx(together.tolist(), rel=1e-12)
    assert divergence.changed == int((found.argmax(-1) != expected.argmax(-1)).sum())


def test_standard_error_is_that_of_the_spread_between_texts() -> None:
    """Over repeated samples of texts, whose tokens are alike, the means scatter by about the standard error.

    Computed from the tokens as if they were independent, it would be five times too small.
    """
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(400):
        levels = torch.rand(20, generator=generator)  # of each of 20 texts
        values = {
            text: (level + 0.05 * torch.rand(25, generator=generator)).tolist() for text, level in enumerate(levels)
        }
        sample = Divergence(tokens=500, texts=dict(values))
        means.append(sample.mean)
        errors.append(sample.standard_error)
    scatter = float(torch.tensor(means).std())
    assert torch.tensor(errors).mean() == pytest.approx(scatter, rel=0.1)
    values = torch.tensor(list(sample.texts.values()))
    assert sample.standard_error > 4 * float(values.std()) / math.sqrt(values.numel())


def test_a_single_text_counts_by_its_tokens() -> None:
    divergence = Divergence(tokens=4, texts={"only": [1.0, 2.0, 3.0, 4.0]})
    assert divergence.mean == 2.5
    assert divergence.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_logits_that_are_not_finite_are_infinitely_far() -> None:
    """Even a single one, so that no limit is kept."""
    divergence = Divergence()
    divergence.add(0, torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.zeros(2, 2))
    assert divergence.mean == math.inf
    assert divergence.standard_error == math.inf


def test_without_enough_tokens_the_mean_is_not_known() -> None:
    assert Divergence().standard_error == math.inf
    assert Divergence(tokens=1, texts={0: [0.1]}).standard_error == math.inf
