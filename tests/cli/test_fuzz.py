"""Values that nobody thought of, for every key of the schema: accepted, or refused in one short message."""

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from accel.cli.compose import compose, execute
from accel.cli.messages import USER_ERRORS, explain
from accel.config import bounds
from accel.config.generate_options import OWN_OPTIONS
from accel.config.schema import Config
from accel.pipeline.runner import Pipeline
from tests.conftest import overrides_for

LINES = 3  # the hub adds two of advice
# Read by Hydra's grammar as numbers beyond each bound, other types, empty values, and values that no key takes.
AWKWARD = (
    *("nan", "inf", "-inf", "-1", "0", "1.5", "1e30", str(10**23), "1000000", "-0.0", "true", "null"),
    *("''", "abc", "'two words'", "[]", "{}", "{a:1}", "[abc]", "[-1]", "[1000000]", "[[99999]]", "[null]", "[{a:1}]"),
    *("'é漢🙂'", "'\\u202e'", "/dev/zero", "'../x'", "'???'", "'${oc.env:HOME}'", "'${nothing}'"),
)


def leaves(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values below a dataclass, and those of `generate`."""
    for item in fields(section):
        if is_dataclass(item.type):
            yield from leaves(item.type, f"{prefix}{item.name}.")
        elif item.name == "generate":
            names = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} | OWN_OPTIONS
            yield from (f"generate.{name}" for name in sorted(names - {"transformers_version"}))
        else:
            yield f"{prefix}{item.name}"


GROUPS = ("architecture", "model", "precision", "runtime")
KEYS = (*(key for key in leaves(Config) if key not in GROUPS), *GROUPS)
values = st.one_of(
    st.sampled_from(AWKWARD),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.integers(), max_size=3).map(str),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="'\\"), max_size=8).map(repr),
)


def numbers_of(value: Any) -> Iterator[float]:
    """Yield all floats in nested dataclasses, lists and dictionaries."""
    if is_dataclass(value):
        value = [getattr(value, item.name) for item in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for element in value:
            yield from numbers_of(element)
    elif isinstance(value, float):
        yield value


def attempt(override: str, checkpoint: Path) -> str | None:
    """Compose and check a configuration as a run does, up to its first stage. Return the message of an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = compose(overrides_for(checkpoint, Path("unused"), "stage=[export,generate]", override))
            execute(config)
        except USER_ERRORS as error:
            return explain(error)
    assert all(math.isfinite(number) for number in numbers_of(config)), f"{override} is accepted"
    return None


def names(message: str, key: str) -> bool:
    """Return whether a message names a key, as it was given and not as a part of another one."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message) is not None


def assert_clear(override: str, checkpoint: Path) -> None:
    message = attempt(override, checkpoint)
    if message is not None:
        assert 0 < len(message.strip().splitlines()) <= LINES, (override, message)
        key = override.partition("=")[0]
        assert names(message, key) or message.startswith(f"can't read '{key}="), (override, message)


@pytest.fixture(scope="module")
def no_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no stage run, and let values that stand for a folder name an empty one."""
    empty = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(empty)
        patch.setenv("HOME", str(empty))
        patch.setattr(Pipeline, "run", lambda self, stages: {})
        yield


def test_every_number_has_bounds() -> None:
    """A new number of the schema can't be forgotten: its field declares bounds."""

    def unbounded(section: Any, prefix: str = "") -> Iterator[str]:
        for item in fields(section):
            if is_dataclass(item.type):
                yield from unbounded(item.type, f"{prefix}{item.name}.")
            elif re.search(r"\b(int|float)\b", str(item.type)) and bounds.BOUNDS not in item.metadata:
                yield f"{prefix}{item.name}"

    assert list(unbounded(Config)) == []


FUZZ = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@settings(FUZZ, max_examples=25)
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key(key: str, value: str, tiny: Path, no_stage: None) -> None:
    assert_clear(f"{key}={value}", tiny)


@pytest.mark.soak
@pytest.mark.parametrize("key", KEYS)
def test_awkward_values_of_each_key(key: str, tiny: Path, no_stage: None) -> None:
    for value in AWKWARD:
        assert_clear(f"{key}={value}", tiny)
