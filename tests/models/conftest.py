"""The tiny T5 as a deployable and in PyTorch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import T5ForConditionalGeneration

from accel.models.generation import AcceleratedModel
from accel.models.loading import load


@pytest.fixture(scope="module")
def model(deployable: Path) -> Iterator[AcceleratedModel]:
    with load(deployable, runtime="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def eager(tiny: Path) -> T5ForConditionalGeneration:
    loaded: T5ForConditionalGeneration = T5ForConditionalGeneration.from_pretrained(tiny)
    return loaded.eval()
