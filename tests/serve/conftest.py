"""Models with static caches beside an encoder and without one, as servers open them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from accel import testing
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from tests.conftest import Build


@pytest.fixture(scope="module")
def t5(build: Build, tiny: Path) -> Iterator[AcceleratedModel]:
    folder = build(tiny, "verify", ("runtime.static=true",))[1]["verify"].folder
    with load(folder, "cpu", static=True, buckets=[8, 16, 32]) as opened:
        yield opened


@pytest.fixture(scope="module")
def causal(gpt2: testing.Subject) -> AcceleratedModel:
    assert gpt2.static is not None
    return gpt2.static


@pytest.fixture(scope="module", params=["t5", "causal"])
def model(request: pytest.FixtureRequest) -> AcceleratedModel:
    opened: AcceleratedModel = request.getfixturevalue(request.param)
    return opened
