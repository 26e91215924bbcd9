"""Every family generates PyTorch's tokens by the fused engine, by every way of decoding."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

import accel
from accel import testing
from accel.config.engines import FUSED
from accel.testing.subject import BUCKETS
from tests.families import FAMILIES

FAST = {"gpt2", "whisper"}  # exported in the fast tier anyway
# Of the artifacts, which no engine changes, and those that set or count what only the growing caches' runtime has.
OTHER = {"verified", "weights_once", "mostly_fp16"}
CHECKS = [check for check in testing.CHECKS if testing.name(check) not in OTHER]
FAST_CHECKS = {"greedy", "beams", "assisted", "rows_alone", "static_caches", "prompt_cache"}


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """The tiny model of one family, with static caches and the fused engine."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{request.param}.lock"),
        testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts) as subject,
        accel.load(
            subject.artifacts["verify"].folder, "cpu", static=True, capture=True, buckets=BUCKETS, engine=FUSED
        ) as fused,
    ):
        assert fused.runtime.engine == FUSED
        yield replace(subject, model=fused, static=fused)


@pytest.mark.parametrize("check", CHECKS, ids=testing.name)
@pytest.mark.parametrize("subject", ["gpt2", "t5", "whisper"], indirect=True, scope="module")
def test_conformance(check: testing.Check, subject: testing.Subject) -> None:
    check(subject)
