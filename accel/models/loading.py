"""Opens a deployable's folder as a model with `generate`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from accel.config.packages import group_files
from accel.config.presets import runtime_preset
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError
from accel.models.generation import AcceleratedModel, model_over
from accel.runtime import layout
from accel.runtime.dynamic_cache import open_dynamic
from accel.runtime.protocol import Runtime
from accel.runtime.providers import check_provider, fastest
from accel.runtime.session import SessionSettings
from accel.runtime.static_cache import open_static

logger = logging.getLogger(__name__)

AUTO = "auto"
# Names that options of `load` may never have: they say where a model on the hub lies, and what may be done with it.
RESERVED = frozenset({"revision", "subfolder", "token", "check", "trust_remote_code"})


def open_model(folder: Path, runtime: RuntimeConfig) -> AcceleratedModel:
    """The model in a deployable's or a candidate's folder. Raises `AccelError` if there is none."""
    if not (folder / layout.DECODER).is_file():
        raise AccelError(f"{str(folder)!r} holds no {layout.DECODER}: not a folder that accel made")
    return as_model(_open_runtime(folder, runtime), folder)


def _open_runtime(folder: Path, runtime: RuntimeConfig) -> Runtime[Any]:
    settings = SessionSettings.of(runtime)
    if not runtime.static:
        return open_dynamic(folder, settings, runtime.device)
    if not (folder / layout.STATIC_DECODE).is_file():
        logger.warning("%s holds no %s: its caches grow, whatever runtime.static says", folder, layout.STATIC_DECODE)
        return open_dynamic(folder, settings, runtime.device)
    opened = open_static(
        folder,
        settings,
        runtime.device,
        runtime.buckets,
        session=runtime.static_session,
        environment=runtime.static_environment,
        capture=runtime.capture,
        batches=runtime.capture_batch_sizes,
    )
    opened.prepare()
    return opened


def as_model(runtime: Runtime[Any], folder: Path) -> AcceleratedModel:
    """`runtime` with the config and the generation config in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    described = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if described else GenerationConfig.from_model_config(config)
    return model_over(runtime, config, generation)


def verification_of(folder: Path) -> dict[str, object] | None:
    """What `verify` wrote into a deployable; None for a candidate."""
    path = folder / layout.VERDICT
    return json.loads(path.read_text()) if path.is_file() else None


def built_runtime(folder: Path) -> dict[str, Any] | None:
    """The runtime that a deployable was built and verified for, as JSON; None where nobody noted it."""
    path = folder / layout.MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]["runtime"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def load(folder: str | Path, runtime: str = "auto", **options: Any) -> AcceleratedModel:
    """Open the model in a folder that accel made, ready for `generate`.

    Args:
        folder: A deployable, or an unverified candidate, which is said.
        runtime: A preset, by the name of its YAML file in a group `runtime`. `auto`: what the deployable was built for
            where that can run here, else `cuda` where there is a GPU, else `cpu`.
        options: Values in place of the preset's, by the names of `accel.config.schema.RuntimeConfig`: `threads=1`,
            `buckets=[128, 1024]`, `session={...}`, `provider_options={...}`. What is not given is as the deployable
            was built with, where that was the same preset.

    Works in any thread, several times at once, and inside a Hydra application.

    Raises:
        AccelError: The folder holds no deployable, the preset or an option doesn't exist, or a value or the device
            can't be used.
    """
    for name in RESERVED.intersection(options):
        raise AccelError(f"accel.load: {name!r} is reserved for models on the hub, which this version can't open")
    built = built_runtime(Path(folder))
    if runtime == AUTO:
        runtime = _preset_for(built)
    where = runtime_preset(runtime, built, **options)
    check_provider(where.provider)
    if verification_of(Path(folder)) is None:
        logger.warning("%s: unverified, no %s", folder, layout.VERDICT)
    return open_model(Path(folder), where)


def _preset_for(built: Mapping[str, Any] | None) -> str:
    """The preset that a deployable was built for where it can run here, else the fastest."""
    best = fastest()
    known = built is not None and built.get("name") in group_files("runtime")
    if built is not None and known and (built.get("device") == "cpu") == (best == "cpu"):
        return str(built["name"])
    return best
