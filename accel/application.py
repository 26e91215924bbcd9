"""From a composed configuration to finished stages: what the command line and `accel.build` share."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from accel import registry, schema
from accel.artifacts import Artifact
from accel.errors import AccelError, unknown
from accel.pipeline import Pipeline, chosen
from accel.schema import Config, RuntimeConfig
from accel.validation import validate

AUTO = "auto"


def settle(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed configuration, with every `auto` replaced by what it stands for.

    Choices that name a file in `conf/` are composed again, so that the rest of `overrides` still applies on top.
    Raises `AccelError` on a value that can't be used.
    """
    chosen(OmegaConf.to_container(composed.stage) if OmegaConf.is_config(composed.stage) else composed.stage)
    config = typed(composed)
    choices: dict[str, str] = {}
    if config.model.name == AUTO and not config.model.checkpoint:
        raise AccelError("model=auto needs model.checkpoint=FOLDER_OR_HUB_ID")
    if config.runtime.name == AUTO:
        choices["runtime"] = _runtime()
    if config.precision.name == AUTO:
        runtime = choices.get("runtime", config.runtime.name)
        choices["precision"] = "fp32" if runtime == "cpu" else "fp16"
    if config.architecture.get("_target_") is None:
        choices["architecture"] = registry.choose(_model_type(config))
    if choices:
        kept = [given for given in overrides if given.split("=")[0].lstrip("+") not in choices]
        composed = hydra.compose("config", [*kept, *(f"{group}={name}" for group, name in choices.items())])
        config = typed(composed)
    if config.model.name == AUTO:
        config.model.name = Path(str(config.model.checkpoint)).name or "model"
    validate(config)
    return config


def runtime_named(name: str) -> RuntimeConfig:
    """The runtime that `conf/runtime/<name>.yaml` describes. Raises Hydra's error, listing the choices, on another."""
    schema.register()
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
    model_type = _model_type(config)
    if model_type not in architecture.model_types:
        raise unknown(
            f"model type for architecture {config.architecture['_target_']}", model_type, architecture.model_types
        )
    return Pipeline(config, architecture).run(chosen(config.stage))


def compose(overrides: Sequence[str]) -> Config:
    """The configuration for `overrides` as on the command line, outside Hydra's own application."""
    schema.register()
    with hydra.initialize_config_module("accel.conf", version_base="1.3"):
        return settle(hydra.compose("config", list(overrides)), overrides)


def _model_type(config: Config) -> str:
    from accel.stages import checkpoint

    checkpoint.check(config.model)
    return str(checkpoint.model_config(config.model).model_type)


def _runtime() -> str:
    from accel.runtime.providers import CUDA, available_providers

    return "cuda" if CUDA in available_providers() and _cuda() else "cpu"


def _cuda() -> Any:
    import torch

    return torch.cuda.is_available()
