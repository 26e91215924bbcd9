"""A tiny T5 end to end: export, merge, verify, generate."""

from pathlib import Path

import torch
from transformers import T5ForConditionalGeneration

from accel.models.loading import load, verification_of
from tests.conftest import Build


def test_verified_and_same_tokens(build: Build, tiny: Path) -> None:
    """The merged decoder generates PyTorch's tokens, for inputs and options that verify did not use."""
    _, artifacts = build(tiny, "verify")
    folder = artifacts["verify"].folder
    verification = verification_of(folder)
    assert verification is not None
    assert verification["passed"]
    assert set(verification["identical"].values()) == {1.0}
    eager = T5ForConditionalGeneration.from_pretrained(tiny).eval()
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 120, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with load(folder, runtime="cpu") as model:
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}):
            settings = {"max_new_tokens": 17, "no_repeat_ngram_size": 1, **options}
            expected = eager.generate(input_ids=ids, attention_mask=mask, **settings)
            found = model.generate(input_ids=ids, attention_mask=mask, **settings)
            assert len(set(expected.flatten().tolist())) > 15
            assert torch.equal(found, expected)
