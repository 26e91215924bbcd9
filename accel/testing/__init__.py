"""The conformance suite: whether an architecture takes its models the whole road and loses nothing that `generate` can.

It ships, so that an adapter in another package is held to the same:

    import pytest
    from accel import testing

    @pytest.fixture(scope="module")
    def subject(tmp_path_factory):
        with testing.prepare(TINY_CONFIG, tmp_path_factory.mktemp("mine"), ["architecture=mine"]) as subject:
            yield subject

    @pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
    def test_conformance(check, subject):
        check(subject)

Every check raises `AssertionError` where PyTorch and the deployable part ways.
"""

from accel.testing.checks import CHECKS, Check, name
from accel.testing.subject import Subject, prepare, random_model

__all__ = ["CHECKS", "Check", "Subject", "name", "prepare", "random_model"]
