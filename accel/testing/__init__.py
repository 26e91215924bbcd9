"""Conformance suite: checks that an architecture's models run end to end and that no feature of `generate` is lost.

It is part of the package, so that adapters in other packages can be checked in the same way:

    import pytest
    from accel import testing

    @pytest.fixture(scope="module")
    def subject(tmp_path_factory):
        with testing.prepare(TINY_CONFIG, tmp_path_factory.mktemp("mine"), ["architecture=mine"]) as subject:
            yield subject

    @pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
    def test_conformance(check, subject):
        check(subject)

Every check raises `AssertionError` where the deployable's results differ from PyTorch's.
"""

from accel.testing.checks import CHECKS, Check, name
from accel.testing.subject import Subject, prepare, random_model

__all__ = ["CHECKS", "Check", "Subject", "name", "prepare", "random_model"]
