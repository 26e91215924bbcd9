"""From a composed configuration to finished stages: what the command line and `accel.build` share."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from accel import console
from accel.adapters import registry
from accel.cli.validate import check_lengths, check_texts, validate
from accel.config import plugins, schema
from accel.config.schema import Config, RuntimeConfig
from accel.errors import AccelError, unknown
from accel.pipeline.runner import Pipeline, chosen
from accel.pipeline.store import Artifact
from accel.stages import generate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO = "auto"
ENCODER_DECODER, DECODER_ONLY = "seq2seq", "causal"  # architectures of any model of that shape
ADD_ONE = "docs/add-an-architecture.md says how to add one: often a YAML of two lines"


def settle(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed configuration, with every `auto` replaced by what it stands for.

    Choices that name a file in `conf/` are composed again, so that the rest of `overrides` still applies on top.
    Raises `AccelError` on a value that can't be used.
    """
    chosen(OmegaConf.to_container(composed.stage) if OmegaConf.is_config(composed.stage) else composed.stage)
    config = typed(composed)
    choices: dict[str, str] = {}
    keys = {given.split("=")[0].lstrip("+") for given in overrides}
    if "model.checkpoint" in keys and "model" not in keys:  # of the default model nothing but its name was meant
        return settle(_again(overrides, {"model": AUTO}), [*overrides, f"model={AUTO}"])
    if config.model.name == AUTO and not config.model.checkpoint:
        raise AccelError("model=auto needs model.checkpoint=FOLDER_OR_HUB_ID")
    if config.runtime.name == AUTO:
        choices["runtime"] = _runtime()
    if config.precision.name == AUTO:
        runtime = choices.get("runtime", config.runtime.name)
        choices["precision"] = "fp32" if runtime == "cpu" else "fp16"
    if config.architecture.get("_target_") is None:
        choices["architecture"] = _architecture(config)
    if choices:
        config = typed(_again(overrides, choices))
    if config.model.weights == "random":
        config.model.references = None  # nothing that random weights write is right
    if config.model.name == AUTO:
        config.model.name = Path(str(config.model.checkpoint)).name or "model"
    validate(config)
    return config


def _again(overrides: Sequence[str], choices: Mapping[str, str]) -> DictConfig:
    """The configuration for `overrides`, of which `choices` (group -> file in `conf/`) replace those of their group."""
    kept = [given for given in overrides if given.split("=")[0].lstrip("+") not in choices]
    return hydra.compose("config", [*kept, *(f"{group}={name}" for group, name in choices.items())])


def runtime_named(name: str) -> RuntimeConfig:
    """The runtime that `conf/runtime/<name>.yaml` describes. Raises Hydra's error, listing the choices, on another."""
    _prepare()
    with hydra.initialize_config_module("accel.conf", version_base="1.3"):
        runtime = typed(hydra.compose("config", [f"runtime={name}"])).runtime
    return runtime_named(_runtime()) if runtime.name == AUTO else runtime


def typed(composed: DictConfig) -> Config:
    """The dataclass behind a composed configuration."""
    _refuse_extra(composed, Config, "")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise AccelError("conf/config.yaml must start from the schema")
    return config


def _refuse_extra(section: Any, kind: Any, prefix: str) -> None:
    """Raises `AccelError` on a key that `+section.key=value` added where the schema has none."""
    known = {field.name: field.type for field in fields(kind)}
    for key in section:
        if key not in known:
            raise unknown("config key", f"{prefix}{key}", [f"{prefix}{name}" for name in known])
        if is_dataclass(known[key]):
            _refuse_extra(section[key], known[key], f"{prefix}{key}.")


def execute(config: Config) -> dict[str, Artifact]:
    """Run the stages the configuration asks for."""
    architecture = registry.build(config.architecture)
    description = _description(config)
    model_type = description.model_type
    if architecture.model_types and model_type not in architecture.model_types:
        raise unknown(
            f"model type for architecture {config.architecture['_target_']}", model_type, architecture.model_types
        )
    stages = chosen(config.stage, mixed=config.precision.dtype != "float32")
    check_lengths(config, description, stages)
    if "generate" in stages:
        generate.check(config, description)
    check_texts(config, stages)
    return Pipeline(config, architecture).run(stages)


def compose(overrides: Sequence[str]) -> Config:
    """The configuration for `overrides` as on the command line, outside Hydra's own application."""
    _prepare()
    with hydra.initialize_config_module("accel.conf", version_base="1.3"):
        return settle(hydra.compose("config", list(overrides)), overrides)


def _prepare() -> None:
    """Make Hydra know the types, and the packages that bring configuration of their own."""
    schema.register()
    plugins.register()


def _description(config: Config) -> "PretrainedConfig":
    """The Hugging Face config of the model, which generates text and keeps keys and values. Raises `AccelError`."""
    from accel.models.model_class import obstacle
    from accel.stages import checkpoint

    checkpoint.check(config.model)
    description = checkpoint.model_config(config.model)
    if reason := obstacle(description):
        raise AccelError(
            f"{config.model.checkpoint or config.model.name}: {reason}.\n"
            f"Model types with an architecture of their own: {', '.join(registry.model_types())}.\n{ADD_ONE}"
        )
    return description


def _architecture(config: Config) -> str:
    """The architecture whose YAML names the checkpoint's model type; failing that, the one of its shape."""
    description = _description(config)
    name = registry.choose(description.model_type)
    if name is None:
        name = ENCODER_DECODER if description.is_encoder_decoder else DECODER_ONLY
        console.note(
            f"model type {description.model_type!r}: no architecture names it, so architecture={name}, the generic "
            f"{'encoder-decoder' if description.is_encoder_decoder else 'decoder-only'} shape, is taken"
        )
    return name


def _runtime() -> str:
    from accel.runtime.providers import CUDA, available_providers

    return "cuda" if CUDA in available_providers() and _cuda() else "cpu"


def _cuda() -> Any:
    import torch

    return torch.cuda.is_available()
