"""Configuration from other packages can be chosen; duplicates and broken packages are reported by name."""

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

MakePackage = Callable[..., None]


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePackage:
    """Function that makes a package with YAML files and an entry point, for the length of a test."""
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


def test_architecture_from_another_package(make_package: MakePackage, tmp_path: Path) -> None:
    """It is listed beside the built-in ones and found by model type; the package's code is not imported."""
    make_package("brought_one", some=SOME)
    (tmp_path / "brought_one" / "adapter.py").write_text("raise RuntimeError('imported')")
    assert "some" in registry.names()
    assert "t5" in registry.names()
    assert registry.choose("some_type") == "some"
    config = compose(["architecture=some", "runtime=cpu"])
    assert config.architecture["model_types"] == ["some_type"]
    assert not [module for module in sys.modules if module.startswith("brought_one.adapter")]


def test_runtime_from_another_package(make_package: MakePackage) -> None:
    """It extends a built-in one by its `defaults` list, with and without Hydra."""
    make_package("brought_five", "runtime", quiet="defaults:\n  - cpu\n  - _self_\nname: quiet\nthreads: 1\n")
    preset = runtime_preset("quiet")
    assert (preset.name, preset.threads, preset.provider) == ("quiet", 1, "CPUExecutionProvider")
    assert preset == compose(["architecture=t5", "runtime=quiet"]).runtime
    assert runtime_preset("quiet", buckets=[32]).buckets == [32]


def test_runtime_with_circular_defaults(make_package: MakePackage) -> None:
    make_package("brought_six", "runtime", one="defaults: [two]\nname: one\n", two="defaults: [one]\nname: two\n")
    with pytest.raises(AccelError, match="leads back to itself: one -> two -> one"):
        runtime_preset("one")


@pytest.mark.parametrize("taken", ["bart", "some"])
def test_duplicate_name(make_package: MakePackage, taken: str) -> None:
    """A name that accel or another package already uses is refused."""
    first, second = f"brought_two_{taken}", f"brought_three_{taken}"  # a module is imported once
    make_package(first, some=SOME)
    make_package(second, **{taken: SOME.replace("some_type", "other_type")})
    with pytest.raises(AccelError, match=rf"architecture/{taken}\.yaml is in both .*brought_"):
        hydra_setup.register()


def test_duplicate_model_type(make_package: MakePackage) -> None:
    """Two architectures may list one model type, but then `auto` can't choose."""
    make_package("brought_four", mine=SOME.replace("some_type", "bart"))
    with pytest.raises(AccelError, match="'bart' is named by bart, mine"):
        registry.choose("bart")


def test_missing_package(make_package: MakePackage) -> None:
    make_package("brought_nothing")
    with pytest.raises(AccelError, match=r"brought_nothing = 'brought_nothing\.conf'"):
        hydra_setup.register()


def test_missing_package_on_the_command_line(tmp_path: Path) -> None:
    """A broken installation ends with a message and exit code 2, without a traceback."""
    information = tmp_path / "broken-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[accel.conf]\nbroken = nowhere_at_all.conf\n")
    command = f"import sys; sys.path.append({str(tmp_path)!r}); from accel.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "broken = 'nowhere_at_all.conf'" in done.stderr
    assert "Traceback" not in done.stderr
