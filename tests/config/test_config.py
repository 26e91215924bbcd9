"""Every YAML composes into a usable configuration, and the Python interface works."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from transformers import PretrainedConfig

import accel
from accel.adapters import registry
from accel.adapters.types import Architecture
from accel.cli.compose import compose
from accel.config import hydra_setup
from accel.config.presets import runtime_preset
from accel.config.schema import Config
from accel.errors import AccelError
from accel.graph.precision.formats import FORMATS
from accel.models import checkpoints
from accel.models.model_class import model_class
from architectures.seq2seq import Seq2Seq
from tests.conftest import overrides_for

CONF = Path(__file__).parents[2] / "conf"
ROOT = CONF.parent


def choices(group: str) -> list[str]:
    """Return the names of a group's YAMLs, without `auto`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "auto")


def content(path: Path) -> dict[str, Any]:
    """Load a YAML file."""
    return yaml.safe_load(path.read_text()) or {}


# every YAML


@pytest.mark.parametrize("name", choices("model"))
def test_model_composes(name: str) -> None:
    """Each model's YAML composes, has its file's name, and belongs to an existing architecture."""
    values = content(CONF / "model" / f"{name}.yaml")
    weights = "random" if values.get("config") else "pretrained"
    config = compose([f"model={name}", f"model.weights={weights}", "runtime=cpu"])
    assert config.model.name == name
    hf_config = checkpoints.model_config(config.model)
    assert isinstance(hf_config, PretrainedConfig)
    assert hf_config.model_type in registry.build(config.architecture).model_types


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("t5-small", 60.5e6),
        ("t5-base", 222.9e6),
        ("t5-large", 737.7e6),
        ("t5-3b", 2851.6e6),
        ("t5-11b", 11307.3e6),
        ("bart-base", 139.4e6),
        ("gpt2", 124.4e6),
        ("whisper-tiny", 37.76e6),
    ],
)
def test_published_dimensions(name: str, parameters: float) -> None:
    """A model of the YAML's dimensions has the published number of parameters, within 0.1%."""
    config = checkpoints.model_config(compose([f"model={name}", "model.weights=random"]).model)
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("name", choices("architecture"))
def test_architecture_builds(name: str) -> None:
    """Each architecture's YAML makes an adapter with at least one model type, except the generic ones."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / "architecture" / f"{name}.yaml"))
    assert isinstance(config, dict)
    adapter = registry.build(config)
    assert isinstance(adapter, Architecture)
    assert bool(adapter.model_types) is (name not in ("causal", "seq2seq"))  # the generic ones
    assert adapter.components()


@pytest.mark.parametrize("name", choices("runtime"))
def test_runtime_composes(name: str) -> None:
    """Each runtime's YAML has its file's name, a provider and a device."""
    config = runtime_preset(name)
    assert config.name == name
    assert config.provider.endswith("ExecutionProvider")
    assert config.device


@pytest.mark.parametrize("name", choices("precision"))
def test_precision_composes(tiny: Path, name: str) -> None:
    """Each precision's YAML has its file's name."""
    config = compose(overrides_for(tiny, Path("unused"), "stage=verify", f"precision={name}"))
    assert config.precision.name == name
    assert config.precision.dtype in FORMATS


def test_auto_is_resolved(tiny: Path) -> None:
    """In a composed configuration every `auto` is replaced: runtime, precision and architecture."""
    config = compose(["model=auto", f"model.checkpoint={tiny}", "runtime=cpu"])
    assert config.precision.name == "fp32"
    assert config.architecture["_target_"] == "accel.architectures.seq2seq.Seq2Seq"
    assert config.model.name == tiny.name
    assert compose(["model=auto", f"model.checkpoint={tiny}"]).runtime.name in choices("runtime")


def test_another_checkpoint_is_another_model(tiny: Path) -> None:
    """With `model.checkpoint` alone, name, references and architecture of the default model aren't used."""
    config = compose([f"model.checkpoint={tiny}", "runtime=cpu"])
    assert (config.model.name, config.model.references) == (tiny.name, None)
    assert config.architecture["model_types"] == ["t5"]
    named = compose(["model=t5-g2p", f"model.checkpoint={tiny}", "runtime=cpu"])  # explicit, so the rest applies
    assert (named.model.name, named.model.references) == ("t5-g2p", "heldout.tsv")


def test_overrides_apply_beside_auto(tiny: Path) -> None:
    """Values from the command line are kept when `auto` is resolved."""
    config = compose(overrides_for(tiny, Path("unused"), "export.seed=5", "runtime.threads=1"))
    assert (config.export.seed, config.runtime.threads) == (5, 1)


def test_sweeps_set_existing_keys() -> None:
    """Each sweep's YAML sets Hydra's sweeper, and every key it sweeps over exists."""
    for path in (CONF / "sweep").glob("*.yaml"):
        swept = content(path)["hydra"]["sweeper"]["params"]
        assert swept
        for key in swept:
            section, _, name = key.partition(".")
            assert name in {field.name for field in fields(getattr(Config(), section))} if name else section


# schema and YAML agree


def sections() -> Iterator[tuple[str, Any]]:
    """The sections that have values of their own in conf/config.yaml."""
    for field in fields(Config):
        value = getattr(Config(), field.name)
        if is_dataclass(value) and field.name not in ("model", "precision", "runtime"):
            yield field.name, value


def test_every_key_of_the_schema_has_a_value_in_yaml() -> None:
    """conf/config.yaml lists each key of each section, because it serves as documentation."""
    composed = content(CONF / "config.yaml")
    for name, section in sections():
        keys = {field.name for field in fields(section)}
        assert set(composed.get(name) or {}) == keys, name


def test_values_in_yaml_are_the_defaults_of_the_schema() -> None:
    """`restrict_config` resets undeclared sections to the schema's defaults, which must be the YAML's values."""
    composed = content(CONF / "config.yaml")
    for name, section in sections():
        for key, value in (composed.get(name) or {}).items():
            default = getattr(section, key)
            if isinstance(value, dict):  # switches, on by default
                assert set(value.values()) <= {True}, f"{name}.{key}"
            else:
                assert value == default or float(value) == default, f"{name}.{key}"


@pytest.mark.parametrize("group", ["model", "precision", "runtime"])
def test_groups_use_only_keys_of_the_schema(group: str) -> None:
    """No YAML of a group has a misspelt key."""
    keys = {field.name for field in fields(getattr(Config(), group))}
    for path in (CONF / group).glob("*.yaml"):
        assert set(content(path)) <= keys | {"defaults"}, path.name


# the Python interface


def test_python_interface() -> None:
    """The public names are `build`, `load` and `register`, all documented."""
    assert sorted(accel.__all__) == ["build", "load", "register"]
    for name in accel.__all__:
        assert callable(getattr(accel, name))
        assert getattr(accel, name).__doc__
    with pytest.raises(AttributeError, match="biuld"):
        accel.biuld  # noqa: B018


def test_importing_accel_is_quick() -> None:
    """`import accel` imports neither torch nor transformers."""
    code = "import sys, accel; print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


class Other(Seq2Seq):
    """Adapter as a notebook or another package would define it."""


@pytest.fixture
def unregister() -> Iterator[None]:
    """Remove the architecture that a test registered."""
    yield
    ConfigStore.instance().repo["architecture"].pop("other.yaml", None)


@pytest.mark.usefixtures("unregister")
def test_registered_architecture_can_be_chosen(tiny: Path) -> None:
    """A class registered by `accel.register` can be chosen by `architecture=`, with its options."""
    hydra_setup.register()
    accel.register("other", Other, model_types=["t5"], layers="num_decoder_layers")
    config = compose(overrides_for(tiny, Path("unused"), "architecture=other"))
    assert config.architecture["_target_"].endswith("test_config.Other")
    assert type(registry.build(config.architecture)).__name__ == "Other"
    with pytest.raises(AccelError, match="'other' is already registered"):
        accel.register("other", Other, model_types=["t5"])


@pytest.mark.parametrize(("name", "options"), [("t5", {"model_types": ["x"]}), ("auto", {"model_types": ["x"]})])
def test_taken_names_are_refused(name: str, options: Mapping[str, Any]) -> None:
    """A built-in architecture can't be replaced."""
    with pytest.raises(AccelError, match=f"'{name}' is already registered"):
        accel.register(name, Seq2Seq, **options)


def test_registering_needs_model_types() -> None:
    """Without model types an architecture could never be found, so registering it fails."""
    with pytest.raises(AccelError, match="model_types"):
        accel.register("another", Seq2Seq)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_types": ["t5"]}, "_target_"),
        ({"_target_": "accel.nowhere.Missing"}, "accel.nowhere.Missing"),
        ({"_target_": "pathlib.Path"}, "model_types"),
        ({"_target_": "accel.architectures.seq2seq.Seq2Seq", "model_types": ["t5"], "layer": "x"}, "layer"),
    ],
)
def test_invalid_architecture(config: dict[str, Any], named: str) -> None:
    """The message names a missing target, one that isn't an adapter, or an unknown option."""
    with pytest.raises(AccelError, match=named):
        registry.build(config)


def test_build_returns_the_deployable(tiny: Path, artifacts: Path, deployable: Path) -> None:
    """`accel.build` returns the deployable, or the unverified bundle if its stages stop before `verify`."""
    overrides = overrides_for(tiny, artifacts)[2:]
    built = accel.build(str(tiny), overrides)
    assert built.folder == deployable
    assert (built.folder / "verification.json").is_file()
    bundle = accel.build(str(tiny), [*overrides, "stage=[export,merge]"])
    assert bundle.manifest.stage == "merge"
    assert not (bundle.folder / "verification.json").exists()
    with pytest.raises(AccelError, match="merge"):
        accel.build(str(tiny), [*overrides, "stage=export"])


def test_load_warns_about_an_unverified_bundle(tiny: Path, artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unverified bundle opens with a warning, a deployable without."""
    common = overrides_for(tiny, artifacts)[2:]
    for overrides, warned in ((["stage=[export,merge]"], True), ([], False)):
        with accel.load(accel.build(str(tiny), [*common, *overrides]).folder, runtime="cpu") as model:
            assert model.can_generate()
        assert ("unverified" in caplog.text) == warned
        caplog.clear()


def test_load_of_a_folder_without_a_deployable(tmp_path: Path) -> None:
    """A folder without a deployable, or one that doesn't exist, is named."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AccelError, match=str(folder)):
            accel.load(folder, runtime="cpu")
