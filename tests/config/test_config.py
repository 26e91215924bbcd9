"""Every YAML composes, and what it describes can be made; the Python interface is there."""

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
    """The YAMLs of a group, `auto` aside."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "auto")


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


# every YAML


@pytest.mark.parametrize("name", choices("model"))
def test_model_composes(name: str) -> None:
    """Each model's YAML makes a valid configuration, is named for its file, and describes a real architecture."""
    described = content(CONF / "model" / f"{name}.yaml")
    weights = "random" if described.get("config") else "pretrained"
    config = compose([f"model={name}", f"model.weights={weights}", "runtime=cpu"])
    assert config.model.name == name
    found = checkpoints.model_config(config.model)
    assert isinstance(found, PretrainedConfig)
    assert found.model_type in registry.build(config.architecture).model_types


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
    """A model of the YAML's dimensions has as many parameters as its model card says, give or take 0.1%."""
    config = checkpoints.model_config(compose([f"model={name}", "model.weights=random"]).model)
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("name", choices("architecture"))
def test_architecture_builds(name: str) -> None:
    """Each architecture's YAML makes an adapter that serves at least one model type."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / "architecture" / f"{name}.yaml"))
    assert isinstance(config, dict)
    adapter = registry.build(config)
    assert isinstance(adapter, Architecture)
    assert bool(adapter.model_types) is (name not in ("causal", "seq2seq"))  # those take any of their shape
    assert adapter.components()


@pytest.mark.parametrize("name", choices("runtime"))
def test_runtime_composes(name: str) -> None:
    """Each runtime's YAML is named for its file and says provider and device."""
    config = runtime_preset(name)
    assert config.name == name
    assert config.provider.endswith("ExecutionProvider")
    assert config.device


@pytest.mark.parametrize("name", choices("precision"))
def test_precision_composes(tiny: Path, name: str) -> None:
    """Each precision's YAML is named for its file."""
    config = compose(overrides_for(tiny, Path("unused"), "stage=verify", f"precision={name}"))
    assert config.precision.name == name
    assert config.precision.dtype in FORMATS


def test_auto_is_resolved(tiny: Path) -> None:
    """What a run gets holds no `auto`: CPU, FP32 there, and the architecture that serves the checkpoint."""
    config = compose(["model=auto", f"model.checkpoint={tiny}", "runtime=cpu"])
    assert config.precision.name == "fp32"
    assert config.architecture["_target_"] == "accel.architectures.seq2seq.Seq2Seq"
    assert config.model.name == tiny.name
    assert compose(["model=auto", f"model.checkpoint={tiny}"]).runtime.name in choices("runtime")


def test_another_checkpoint_is_another_model(tiny: Path) -> None:
    """`model.checkpoint` alone takes nothing of the default model: no references, its own name and architecture."""
    config = compose([f"model.checkpoint={tiny}", "runtime=cpu"])
    assert (config.model.name, config.model.references) == (tiny.name, None)
    assert config.architecture["model_types"] == ["t5"]
    named = compose(["model=t5-g2p", f"model.checkpoint={tiny}", "runtime=cpu"])  # said: the rest holds
    assert (named.model.name, named.model.references) == ("t5-g2p", "heldout.tsv")


def test_overrides_hold_on_top_of_auto(tiny: Path) -> None:
    """Values given on the command line survive the second composition."""
    config = compose(overrides_for(tiny, Path("unused"), "export.seed=5", "runtime.threads=1"))
    assert (config.export.seed, config.runtime.threads) == (5, 1)


def test_every_sweep_is_a_sweep() -> None:
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
    """conf/config.yaml lists each key of each section, so that it can be read as the documentation."""
    composed = content(CONF / "config.yaml")
    for name, section in sections():
        keys = {field.name for field in fields(section)}
        assert set(composed.get(name) or {}) == keys, name


def test_values_in_yaml_are_the_defaults_of_the_schema() -> None:
    """`only` puts undeclared sections at the schema's defaults: they must be what the YAML says."""
    composed = content(CONF / "config.yaml")
    for name, section in sections():
        for key, value in (composed.get(name) or {}).items():
            default = getattr(section, key)
            if isinstance(value, dict):  # switches, which are on unless said otherwise
                assert set(value.values()) <= {True}, f"{name}.{key}"
            else:
                assert value == default or float(value) == default, f"{name}.{key}"


@pytest.mark.parametrize("group", ["model", "precision", "runtime"])
def test_groups_use_only_keys_of_the_schema(group: str) -> None:
    """A misspelt key in a group's YAML is an error, found here rather than by a user."""
    keys = {field.name for field in fields(getattr(Config(), group))}
    for path in (CONF / group).glob("*.yaml"):
        assert set(content(path)) <= keys | {"defaults"}, path.name


# the Python interface


def test_python_interface() -> None:
    """`accel.build`, `accel.load` and `accel.register` are there, documented, and nothing else is promised."""
    assert sorted(accel.__all__) == ["build", "load", "register"]
    for name in accel.__all__:
        assert callable(getattr(accel, name))
        assert getattr(accel, name).__doc__
    with pytest.raises(AttributeError, match="biuld"):
        accel.biuld  # noqa: B018


def test_importing_accel_is_quick() -> None:
    """`import accel` waits for neither torch nor transformers."""
    code = "import sys, accel; print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


class Other(Seq2Seq):
    """An adapter as a notebook or another package would define it."""


@pytest.fixture
def forget() -> Iterator[None]:
    """Takes back what a test registered."""
    yield
    ConfigStore.instance().repo["architecture"].pop("other.yaml", None)


@pytest.mark.usefixtures("forget")
def test_registered_architecture_can_be_chosen(tiny: Path) -> None:
    """`accel.register` makes a class a choice of `architecture=`, under its name and with its options."""
    hydra_setup.register()
    accel.register("other", Other, model_types=["t5"], layers="num_decoder_layers")
    config = compose(overrides_for(tiny, Path("unused"), "architecture=other"))
    assert config.architecture["_target_"].endswith("test_config.Other")
    assert type(registry.build(config.architecture)).__name__ == "Other"
    with pytest.raises(AccelError, match="'other' is already registered"):
        accel.register("other", Other, model_types=["t5"])


@pytest.mark.parametrize(("name", "options"), [("t5", {"model_types": ["x"]}), ("auto", {"model_types": ["x"]})])
def test_taken_names_are_refused(name: str, options: Mapping[str, Any]) -> None:
    """A built-in architecture can't be replaced unnoticed."""
    with pytest.raises(AccelError, match=f"'{name}' is already registered"):
        accel.register(name, Seq2Seq, **options)


def test_registering_needs_model_types() -> None:
    """Without model types nothing could find the architecture: the message says what is missing."""
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
def test_broken_architecture_says_what_is_wrong(config: dict[str, Any], named: str) -> None:
    """No target, a target that isn't there, one that is no adapter, an option it doesn't have."""
    with pytest.raises(AccelError, match=named):
        registry.build(config)


def test_build_returns_the_deployable(tiny: Path, artifacts: Path, deployable: Path) -> None:
    """`accel.build` gives the verified folder, or the candidate when its stages stop before `verify`."""
    given = overrides_for(tiny, artifacts)[1:]
    built = accel.build(str(tiny), given[1:])
    assert built.folder == deployable
    assert (built.folder / "verdict.json").is_file()
    bundle = accel.build(str(tiny), [*given[1:], "stage=[export,merge]"])
    assert bundle.manifest.stage == "merge"
    assert not (bundle.folder / "verdict.json").exists()
    with pytest.raises(AccelError, match="merge"):
        accel.build(str(tiny), [*given[1:], "stage=export"])


def test_load_says_that_a_candidate_is_unverified(
    tiny: Path, artifacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A candidate opens, with a warning; a deployable opens without."""
    given = overrides_for(tiny, artifacts)[2:]
    for overrides, warned in ((["stage=[export,merge]"], True), ([], False)):
        with accel.load(accel.build(str(tiny), [*given, *overrides]).folder, runtime="cpu") as model:
            assert model.can_generate()
        assert ("unverified" in caplog.text) == warned
        caplog.clear()


def test_load_refuses_what_is_no_deployable(tmp_path: Path) -> None:
    """A folder that accel did not make, or none at all, is named."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AccelError, match=str(folder)):
            accel.load(folder, runtime="cpu")
