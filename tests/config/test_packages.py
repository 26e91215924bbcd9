"""Configuration from other packages: found, listed and chosen; twins and broken packages are refused by name."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from accel.adapters import registry
from accel.cli.compose import compose
from accel.config import hydra_setup, packages
from accel.config.presets import runtime_preset
from accel.errors import AccelError

Bring = Callable[..., None]


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bring:
    """Make a package with YAML files and an entry point that names it, for the length of a test."""
    points: list[EntryPoint] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "entry_points", lambda group: points if group == "accel.conf" else [])

    def make(package: str, group: str = "architecture", **files: str) -> None:
        points.append(EntryPoint(package, f"{package}.conf", "accel.conf"))
        if files:
            (tmp_path / package / "conf" / group).mkdir(parents=True)
            for folder in (package, f"{package}/conf"):
                (tmp_path / folder / "__init__.py").touch()
        for name, text in files.items():
            (tmp_path / package / "conf" / group / f"{name}.yaml").write_text(text)

    return make


SOME = "_target_: accel.architectures.causal.Causal\nmodel_types: [some_type]\n"


def test_what_a_package_brings_can_be_chosen(bring: Bring, tmp_path: Path) -> None:
    """Its architectures are listed beside ours and found by model type; its code is not imported."""
    bring("brought_one", some=SOME)
    (tmp_path / "brought_one" / "adapter.py").write_text("raise RuntimeError('imported')")
    assert "some" in registry.names()
    assert "t5" in registry.names()
    assert registry.choose("some_type") == "some"
    config = compose(["architecture=some", "runtime=cpu"])
    assert config.architecture["model_types"] == ["some_type"]
    assert not [module for module in sys.modules if module.startswith("brought_one.adapter")]


def test_a_runtime_from_another_package(bring: Bring) -> None:
    """It stands on ours by its `defaults` list, with and without Hydra."""
    bring("brought_five", "runtime", quiet="defaults:\n  - cpu\n  - _self_\nname: quiet\nthreads: 1\n")
    preset = runtime_preset("quiet")
    assert (preset.name, preset.threads, preset.provider) == ("quiet", 1, "CPUExecutionProvider")
    assert preset == compose(["architecture=t5", "runtime=quiet"]).runtime
    assert runtime_preset("quiet", buckets=[32]).buckets == [32]


def test_a_runtime_that_stands_on_itself(bring: Bring) -> None:
    bring("brought_six", "runtime", one="defaults: [two]\nname: one\n", two="defaults: [one]\nname: two\n")
    with pytest.raises(AccelError, match="leads back to itself: one -> two -> one"):
        runtime_preset("one")


@pytest.mark.parametrize("taken", ["bart", "some"])
def test_a_name_taken_twice(bring: Bring, taken: str) -> None:
    """By accel itself, or by another package."""
    first, second = f"brought_two_{taken}", f"brought_three_{taken}"  # a module is imported once
    bring(first, some=SOME)
    bring(second, **{taken: SOME.replace("some_type", "other_type")})
    with pytest.raises(AccelError, match=rf"architecture/{taken}\.yaml is in both .*brought_"):
        hydra_setup.register()


def test_a_model_type_named_twice(bring: Bring) -> None:
    """Two architectures may serve one type, but then `auto` can't choose."""
    bring("brought_four", mine=SOME.replace("some_type", "bart"))
    with pytest.raises(AccelError, match="'bart' is named by bart, mine"):
        registry.choose("bart")


def test_a_package_that_is_not_there(bring: Bring) -> None:
    bring("brought_nothing")
    with pytest.raises(AccelError, match=r"brought_nothing = 'brought_nothing\.conf'"):
        hydra_setup.register()


def test_the_command_line_says_so(tmp_path: Path) -> None:
    """A broken installation ends with the message and exit code 2, not with a traceback."""
    information = tmp_path / "broken-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[accel.conf]\nbroken = nowhere_at_all.conf\n")
    command = f"import sys; sys.path.append({str(tmp_path)!r}); from accel.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "broken = 'nowhere_at_all.conf'" in done.stderr
    assert "Traceback" not in done.stderr
