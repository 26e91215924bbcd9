"""Opens a deployable's folder as a model with `generate`."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from accel import console
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError
from accel.models.generation import AcceleratedModel, model_over
from accel.runtime import layout
from accel.runtime.dynamic_cache import open_growing
from accel.runtime.protocol import Runtime
from accel.runtime.providers import check_provider
from accel.runtime.session import SessionSettings
from accel.runtime.static_cache import open_static


def open_model(folder: Path, runtime: RuntimeConfig) -> AcceleratedModel:
    """The model in a deployable's or a candidate's folder. Raises `AccelError` if there is none."""
    if not (folder / layout.DECODER).is_file():
        raise AccelError(f"{str(folder)!r} holds no {layout.DECODER}: not a folder that accel made")
    return as_model(_open_runtime(folder, runtime), folder)


def _open_runtime(folder: Path, runtime: RuntimeConfig) -> Runtime[Any]:
    settings = SessionSettings.of(runtime)
    if not runtime.static:
        return open_growing(folder, settings, runtime.device)
    if not (folder / layout.STATIC_STEP).is_file():
        console.warn(f"{folder} holds no {layout.STATIC_STEP}: its caches grow, whatever runtime.static says")
        return open_growing(folder, settings, runtime.device)
    opened = open_static(
        folder,
        settings,
        runtime.device,
        runtime.buckets,
        session=runtime.static_session,
        environment=runtime.static_environment,
        capture=runtime.capture,
        batches=runtime.batches,
    )
    opened.prepare()
    return opened


def as_model(runtime: Runtime[Any], folder: Path) -> AcceleratedModel:
    """`runtime` with the config and the generation config in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    described = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if described else GenerationConfig.from_model_config(config)
    return model_over(runtime, config, generation)


def verdict_of(folder: Path) -> dict[str, object] | None:
    """What `verify` wrote into a deployable; None for a candidate."""
    path = folder / layout.VERDICT
    return json.loads(path.read_text()) if path.is_file() else None


def load(folder: str | Path, runtime: str = "auto") -> AcceleratedModel:
    """The model in a folder that `accel` made, ready for `generate`. `runtime` names a YAML in `conf/runtime`.

    Raises `AccelError` if the folder holds no deployable or the runtime can't be used.
    """
    from accel.cli.compose import runtime_named

    where = runtime_named(runtime)
    check_provider(where.provider)
    if verdict_of(Path(folder)) is None:
        console.warn(f"{folder}: unverified, no {layout.VERDICT}")
    return open_model(Path(folder), where)
