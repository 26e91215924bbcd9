"""Divergence of next-token distributions and changed tokens, and how well a number of texts determines them."""

import math

import pytest
import torch

from accel.evaluation.divergence import (
    CONFIDENCE,
    TOKENS_AT_ONCE,
    Divergence,
    TextMeans,
    change_divergence,
    least_tokens,
    share_bound,
)


def logits(*values: float) -> torch.Tensor:
    """Logits [1, vocabulary] of the distribution with these probabilities."""
    return torch.tensor([values]).log()


def test_divergence_of_known_distributions() -> None:
    """From the reference to what is under test, in nats; independent of a constant added to the logits."""
    divergence = Divergence()
    divergence.add("a", logits(0.5, 0.5) + 3, logits(0.25, 0.75))
    divergence.add("a", logits(0.2, 0.8), logits(0.2, 0.8))
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence.divergences.texts["a"] == pytest.approx([expected, 0], abs=1e-7)
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
    assert divergence.divergences.texts[0] == pytest.approx(together.tolist(), rel=1e-12)
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
        sample = TextMeans(dict(values))
        means.append(sample.mean)
        errors.append(sample.standard_error)
    scatter = float(torch.tensor(means).std())
    assert torch.tensor(errors).mean() == pytest.approx(scatter, rel=0.1)
    values = torch.tensor(list(sample.texts.values()))
    assert sample.standard_error > 4 * float(values.std()) / math.sqrt(values.numel())


def test_a_single_text_counts_by_its_tokens() -> None:
    means = TextMeans({"only": [1.0, 2.0, 3.0, 4.0]})
    assert means.mean == 2.5
    assert means.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_logits_that_are_not_finite_are_infinitely_far() -> None:
    """Even a single one, so that no limit is kept."""
    divergence = Divergence()
    divergence.add(0, torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.zeros(2, 2))
    assert divergence.mean == math.inf
    assert divergence.standard_error == math.inf


def test_without_enough_tokens_the_mean_is_not_known() -> None:
    assert Divergence().standard_error == math.inf
    assert TextMeans({0: [0.1]}).standard_error == math.inf


def test_a_change_needs_the_divergence_of_the_nearest_distribution() -> None:
    """Which exists, and no other distribution in which the other id is as likely is nearer."""
    generator = torch.Generator().manual_seed(2)
    reference = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    needed = float(change_divergence(reference[0], reference[2]))
    nearest = torch.tensor([0.35, 0.2, 0.35, 0.1], dtype=torch.float64)
    assert needed == pytest.approx(float((reference * (reference / nearest).log()).sum()))
    others = torch.rand(20_000, 4, dtype=torch.float64, generator=generator) ** 2
    others = torch.cat([others, nearest * (1 + 0.02 * torch.randn(20_000, 4, generator=generator))])
    others /= others.sum(-1, keepdim=True)
    others = others[others[:, 2] >= others[:, 0]]
    divergences = (reference * (reference / others).log()).sum(-1)
    assert len(divergences) > 5000
    assert needed <= divergences.min() < 1.1 * needed
    assert change_divergence(reference[1], reference[2]) == 0
    assert change_divergence(reference[0], torch.zeros(())) == pytest.approx(0.5 * math.log(2))


def test_changes_among_near_ties_are_not_clear() -> None:
    """Those that distributions within the limit have; a flat distribution has no others."""
    divergence = Divergence()
    divergence.add("a", logits(0.1, 0.9), logits(0.6, 0.4))  # 0.02 nats are needed
    divergence.add("b", logits(0.4, 0.6), logits(0.6, 0.4))
    divergence.add("b", logits(0.9, 0.1), logits(0.9, 0.1))
    divergence.add("c", torch.arange(1000.0)[None] / 1e5, -torch.arange(1000.0)[None] / 1e3)
    assert divergence.changed == 3
    needed = float(change_divergence(torch.tensor(0.6), torch.tensor(0.4)))
    assert needed == pytest.approx(0.0201, abs=1e-4)
    assert divergence.clear_changes(0.99 * needed).texts == {"a": [1], "b": [1, 0], "c": [0]}
    assert divergence.clear_changes(1.01 * needed).total == 0


def test_bound_of_a_share() -> None:
    """It is that of as many independent tokens as have the same standard error."""
    assert share_bound(TextMeans()) == 1
    none_of_196 = TextMeans({text: [0.0] * 28 for text in range(7)})
    assert share_bound(none_of_196) == pytest.approx(0.02)
    assert share_bound(TextMeans({0: [0.0] * 32})) > 0.1  # too few
    assert share_bound(TextMeans({text: [1.0] * 8 for text in range(3)})) == pytest.approx(1)
    spread = TextMeans({text: [float(token == 3) for token in range(16)] for text in range(32)})
    together = TextMeans({text: [float(text < 2)] * 16 for text in range(32)})
    assert spread.mean == together.mean == 1 / 16
    assert 1 / 16 < share_bound(spread) < 0.1 < share_bound(together)


def test_the_bound_of_a_share_holds_as_often_as_it_says() -> None:
    """In repeated samples of texts the true share is above it about as seldom as above two standard errors: 2%."""
    generator = torch.Generator().manual_seed(3)
    share, above = 0.03, 0
    for _ in range(500):
        changed = torch.rand(64, 8, generator=generator) < share
        changed[:, 4:] = torch.where(torch.rand(64, 1, generator=generator) < 0.5, changed[:, :4], changed[:, 4:])
        above += share > share_bound(TextMeans(dict(enumerate(changed.double().tolist()))))
    assert above / 500 < 0.05


@pytest.mark.parametrize("share", [0.001, 0.005, 0.02, 0.1, 1.0])
def test_least_tokens_show_a_share(share: float) -> None:
    needed = least_tokens(share)
    for tokens, shown in ((needed, True), (needed - 1, False)):
        if tokens > 0:
            assert (share_bound(TextMeans({0: [0.0] * tokens})) <= share + 1e-12) == shown
    assert least_tokens(0) == 0
    assert CONFIDENCE == 2
