"""Loading of a deployable's folder as a model with `generate`."""

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
# Names that options of `load` may never have. They are kept for loading from the hub: location and permissions.
RESERVED = frozenset({"revision", "subfolder", "token", "check", "trust_remote_code"})


def open_model(folder: Path, runtime: RuntimeConfig) -> AcceleratedModel:
    """Open the model in a folder that accel made, verified or not.

    Args:
        folder: A deployable or an unverified bundle.
        runtime: Execution provider, session options and caches to run it with.

    Raises:
        AccelError: The folder holds no merged decoder.
    """
    if not (folder / layout.DECODER).is_file():
        raise AccelError(f"{str(folder)!r} holds no {layout.DECODER}: not a folder that accel made")
    return as_model(_open_runtime(folder, runtime), folder)


def _open_runtime(folder: Path, runtime: RuntimeConfig) -> Runtime[Any]:
    """Open the sessions of `folder`, with static caches if `runtime` asks for them and the folder has their graph."""
    settings = SessionSettings.of(runtime)
    if not runtime.static:
        return open_dynamic(folder, settings, runtime.device)
    if not (folder / layout.STATIC_DECODE).is_file():
        logger.warning(
            "%s: runtime.static=true has no effect, dynamic caches are used: the folder holds no %s. "
            "Build it again with convert.static_decode=true",
            folder,
            layout.STATIC_DECODE,
        )
        return open_dynamic(folder, settings, runtime.device)
    static_runtime = open_static(
        folder,
        settings,
        runtime.device,
        runtime.buckets,
        session=runtime.static_session,
        environment=runtime.static_environment,
        capture=runtime.capture,
        capture_batch_sizes=runtime.capture_batch_sizes,
    )
    static_runtime.prepare()
    return static_runtime


def as_model(runtime: Runtime[Any], folder: Path) -> AcceleratedModel:
    """Return a model over `runtime`, with the config and the generation config in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    if (folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(folder)
    else:
        generation_config = GenerationConfig.from_model_config(config)
    return model_over(runtime, config, generation_config)


def verification_of(folder: Path) -> dict[str, object] | None:
    """Return the verification result that `verify` wrote into a deployable; None for an unverified bundle."""
    path = folder / layout.VERDICT
    return json.loads(path.read_text()) if path.is_file() else None


def built_runtime(folder: Path) -> dict[str, Any] | None:
    """Return the runtime config that a deployable was built and verified for, as JSON; None if it records none."""
    path = folder / layout.MANIFEST
    try:
        runtime: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]["runtime"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return runtime


def load(folder: str | Path, runtime: str = AUTO, **options: Any) -> AcceleratedModel:
    """Open the model in a folder that accel made, ready for `generate`.

    Works in any thread, in several threads at once, and inside a Hydra application.

    Args:
        folder: A deployable, or an unverified bundle, for which a warning is logged.
        runtime: Preset: name of a YAML file in a config group `runtime`. `auto` is the preset that the deployable was
            built for, if this machine can run it; otherwise `cuda` on a machine with a GPU and `cpu` elsewhere.
        options: Values that replace the preset's, by the field names of `accel.config.schema.RuntimeConfig`:
            `threads=1`, `buckets=[128, 1024]`, `session={...}`, `provider_options={...}`. All other values are the ones
            that the deployable was built with, if that was with the same preset, and the preset's otherwise.

    Returns:
        The model. Close it, or use it as a context manager, to free its sessions.

    Raises:
        AccelError: The folder was not made by accel, the preset or an option doesn't exist, an option's value is
            invalid, or the device can't be used.
    """
    for name in RESERVED.intersection(options):
        raise AccelError(f"accel.load: {name!r} is reserved for models on the hub, which this version can't open")
    built = built_runtime(Path(folder))
    preset = _preset_for(built) if runtime == AUTO else runtime
    config = runtime_preset(preset, built, **options)
    check_provider(config.provider)
    if verification_of(Path(folder)) is None:
        logger.warning("%s is unverified: it holds no %s", folder, layout.VERDICT)
    return open_model(Path(folder), config)


def _preset_for(built: Mapping[str, Any] | None) -> str:
    """Return the preset that a deployable was built for, if it can run here, and the fastest preset otherwise."""
    best = fastest()
    if built is None or built.get("name") not in group_files("runtime"):
        return best
    built_for_cpu = built.get("device") == "cpu"
    return str(built["name"]) if built_for_cpu == (best == "cpu") else best
