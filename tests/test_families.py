"""Every family takes the whole road, and `generate` loses nothing on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from accel import testing
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """The tiny model of one family, exported once."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{request.param}.lock"),
        testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts) as made,
    ):
        yield made


@pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
@pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES],
    indirect=True,
    scope="module",
)
def test_conformance(check: testing.Check, subject: testing.Subject) -> None:
    check(subject)
