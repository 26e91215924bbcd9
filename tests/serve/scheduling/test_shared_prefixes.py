"""Beginnings that prompts share."""

from typing import Any

import torch

from accel.models.prompt_cache import PromptCache
from accel.serve.scheduling.shared_prefixes import SharedPrefixes, common

NO_STATE: Any = None


def prompt(beginning: int, length: int, end: int = 0) -> torch.Tensor:
    """Return a prompt [1, length] whose first `beginning` tokens are 0, 1, ... and the others `1000 + end`."""
    ids = torch.full((1, length), 1000 + end)
    ids[0, :beginning] = torch.arange(beginning)
    return ids


def test_common() -> None:
    assert common(prompt(5, 9), prompt(7, 8, 1)) == 5
    assert common(prompt(5, 9), prompt(5, 7)) == 7
    assert common(prompt(0, 3), prompt(0, 3, 1)) == 0


def test_boundaries() -> None:
    """Only what a second prompt shares, cut to a multiple of 16, at least 32 tokens and never the whole prompt."""
    prefixes = SharedPrefixes(2)
    assert prefixes.boundary(prompt(50, 60), None) == 0
    assert prefixes.boundary(prompt(50, 60, 1), None) == 48
    assert prefixes.boundary(prompt(31, 60, 2), None) == 0
    assert prefixes.boundary(prompt(48, 48), None) == 32
    found = PromptCache(NO_STATE, prompt(48, 48))
    assert prefixes.boundary(prompt(50, 70, 3), found) == 0
    assert SharedPrefixes(0).boundary(prompt(50, 60), None) == SharedPrefixes(0).boundary(prompt(50, 60), None) == 0


def test_the_longest_is_found_and_the_oldest_dropped() -> None:
    prefixes = SharedPrefixes(2)
    short, long = PromptCache(NO_STATE, prompt(32, 32)), PromptCache(NO_STATE, prompt(64, 64))
    other = PromptCache(NO_STATE, prompt(0, 40, 7))
    assert prefixes.find(prompt(50, 60)) is None
    prefixes.keep(short)
    prefixes.keep(long)
    assert prefixes.find(prompt(80, 90)) is long
    assert prefixes.find(prompt(31, 90)) is None
    assert prefixes.find(prompt(32, 32)) is None, "one token must be left to compute"
    assert prefixes.find(prompt(36, 40)) is long, "any number of its tokens serves"
    prefixes.keep(other)
    assert prefixes.find(prompt(0, 50, 7)) is other
    prefixes.keep(short)
    assert prefixes.find(prompt(64, 80)) is short, "the longer one was used before the others"
