"""Loading of a deployable's folder as a model with `generate`."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PretrainedConfig

from accel.config.engines import AUTO as VERIFIED_ENGINE
from accel.config.engines import FUSED, ONNXRUNTIME
from accel.config.packages import group_files
from accel.config.presets import runtime_preset
from accel.config.schema import RuntimeConfig
from accel.data.pretrained import load_config, load_generation_config
from accel.errors import AccelError, unknown
from accel.models import integrity
from accel.models.factory import model_over
from accel.models.generation import AcceleratedModel
from accel.models.rope import angles_depend_on_length
from accel.runtime import layout
from accel.runtime.buckets import Buckets
from accel.runtime.dynamic_cache import open_dynamic
from accel.runtime.protocol import Runtime
from accel.runtime.providers import check_provider, fastest
from accel.runtime.session import SessionSettings
from accel.runtime.static_cache import open_static
from accel.system import remote_code

logger = logging.getLogger(__name__)

AUTO = "auto"
# Names that configs give to the number of decoder positions, the decoder's own first.
POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")
PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # environment variable: GroupQueryAttention stores all scores
HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")  # "name/model", or "model" of the hub's own


def open_model(folder: Path, runtime: RuntimeConfig, dtype: str | None = None) -> AcceleratedModel:
    """Open the model in a folder that accel made, verified or not.

    Args:
        folder: A deployable or an unverified bundle.
        runtime: Execution provider, session options and caches to run it with.
        dtype: Variant to open; None for the only one, or the one of the widest dtype.

    Raises:
        AccelError: The folder holds no merged decoder.
    """
    return as_model(_open_runtime(find_variant(folder, dtype), runtime), folder)


def find_variant(folder: Path, dtype: str | None = None, name: str | None = None) -> layout.DeployableFiles:
    """Return one variant of a deployable.

    Args:
        folder: The deployable.
        dtype: Dtype of the variant; None for the only one, or the one of the widest dtype.
        name: Name of the folder for messages, such as its id on the hub.

    Raises:
        AccelError: The folder has no such variant, or wasn't made by accel, or has an old layout.
    """
    variants = {files.dtype: files for files in layout.variants(folder)}
    if not variants:
        raise AccelError(_why_not_deployable(folder, name or str(folder)))
    if dtype is None:
        return next(iter(variants.values()))
    if dtype not in variants:
        raise unknown(f"dtype of {str(folder)!r}", dtype, list(variants))
    return variants[dtype]


def _why_not_deployable(folder: Path, name: str) -> str:
    """Return a message about a folder without a merged decoder."""
    if (folder / layout.OLD_DECODER).is_file():
        config = built_config(folder / layout.MANIFEST)
        names = [f"{group}={config[group]['name']}" for group in ("precision", "runtime") if group in config]
        return (
            f"{name!r} has the layout of an earlier version, without a folder {layout.GRAPHS!r}. Build it again with\n"
            f"python -m accel {' '.join(['model.checkpoint=CHECKPOINT', *names])}"
        )
    if (folder / layout.CONFIG).is_file():
        return (
            f"{name!r} is a plain checkpoint, not a deployable: it holds no merged decoder. Make one with\n"
            f"    accel.build(checkpoint={name!r}).folder\nor python -m accel model.checkpoint={name}"
        )
    return f"{name!r} holds no merged decoder: not a folder that accel made"


def _positions(config: PretrainedConfig) -> int | None:
    """Return the number of decoder positions that a model was made for; None if its config names none."""
    for name in POSITIONS:
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    return None


def prompt_settings(runtime: RuntimeConfig, config: PretrainedConfig) -> tuple[SessionSettings, int]:
    """Return the settings of a model's sessions, and how many tokens of a prompt to compute at once; 0 for all.

    Args:
        runtime: The runtime's config.
        config: The model's Hugging Face config.
    """
    settings = SessionSettings.of(runtime)
    chunk = 0 if angles_depend_on_length(config) else runtime.prefill_chunk
    if not chunk:  # what bounds the scores of the plain kernel
        environment = {name: value for name, value in settings.environment.items() if name != PLAIN_ATTENTION}
        settings = replace(settings, environment=environment)
    return settings, chunk


def _open_runtime(files: layout.DeployableFiles, runtime: RuntimeConfig) -> Runtime[Any]:
    """Open the sessions of a variant, with static caches if `runtime` asks for them and the variant has their graph."""
    config = load_config(files.folder)
    settings, chunk = prompt_settings(runtime, config)
    reason = _why_not_static(files, runtime)
    if reason is not None:
        if runtime.engine == FUSED:
            raise AccelError(
                f"{files.folder}: runtime.engine={FUSED} needs static caches: {reason}, or engine={ONNXRUNTIME}"
            )
        level = logging.WARNING if runtime.static else logging.INFO
        logger.log(level, "%s: dynamic caches are used: %s", files.folder, reason)
        return open_dynamic(files, settings, runtime.device, prefill_chunk=chunk)
    static_runtime = open_static(
        files,
        settings,
        runtime.device,
        Buckets(runtime.buckets, _positions(config)),
        session=runtime.static_session,
        environment=runtime.static_environment,
        engine=runtime.engine,
        tune=runtime.tune,
        capture=runtime.capture,
        capture_batch_sizes=runtime.capture_batch_sizes,
        prefill_chunk=chunk,
        fused_prefill=runtime.fused_prefill,
    )
    static_runtime.prepare()
    return static_runtime


def _why_not_static(files: layout.DeployableFiles, runtime: RuntimeConfig) -> str | None:
    """Return why a variant isn't opened with static caches, and what to do about it; None if it is."""
    if not runtime.static:
        return "runtime.static=false. Take static=true"
    if not files.static_decode.is_file():
        return (
            "runtime.static=true has no effect: the folder holds no "
            f"{files.static_decode.name}. Build it again with convert.static_decode=true"
        )
    return None


def as_model(runtime: Runtime[Any], folder: Path) -> AcceleratedModel:
    """Return a model over `runtime`, with the config and the generation config in `folder`."""
    config = load_config(folder)
    model = model_over(runtime, config, load_generation_config(folder))
    model.folder = folder
    return model


def verification_of(folder: Path, dtype: str | None = None) -> dict[str, Any] | None:
    """Return the verification result that `verify` wrote into a deployable; None for an unverified bundle.

    Args:
        folder: The deployable.
        dtype: Variant; None for the only one, or the one of the widest dtype.
    """
    path = find_variant(folder, dtype).verification
    return json.loads(path.read_text()) if path.is_file() else None


def built_config(manifest: Path) -> dict[str, Any]:
    """Return the config that a deployable was built and verified with, as JSON; empty if its manifest can't be read."""
    try:
        config: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return config


def built_runtime(files: layout.DeployableFiles) -> dict[str, Any] | None:
    """Return the runtime config that a deployable was built and verified for, as JSON; None if it records none."""
    return built_config(files.manifest).get("runtime")


def load(
    folder: str | Path,
    runtime: str = AUTO,
    *,
    dtype: str | torch.dtype | None = None,
    check: str | bool = integrity.FAST,
    trust_remote_code: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    **options: Any,
) -> AcceleratedModel:
    """Open the model in a folder that accel made, ready for `generate`.

    Works in any thread, in several threads at once, and inside a Hydra application.

    Args:
        folder: A deployable, or an unverified bundle, for which a warning is logged; or the id of a repository on the
            Hugging Face hub that holds one.
        runtime: Preset: name of a YAML file in a config group `runtime`. `auto` is the preset that the deployable was
            built for, if this machine can run it; otherwise `cuda-graph` on a machine with a GPU and `cpu` elsewhere.
        dtype: Variant to open where the folder holds several, such as `"float16"`; by default the widest.
        check: Compare the folder's files with its manifest first. `fast`: large files are hashed at the first load and
            after each change only. `full`: all are hashed now. False: nothing is compared.
        trust_remote_code: Run the Python code in the folder, if its config needs some. It has all rights of this
            process; without this, such a folder is refused.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside `folder` or the repository.
        token: Access token for the hub; by default the one that `hf auth login` stored.
        options: Values that replace the preset's, by the field names of `accel.config.schema.RuntimeConfig`:
            `threads=1`, `buckets=[128, 1024]`, `session={...}`, `provider_options={...}`. All other values are the ones
            that the deployable was built with, if that was with the same preset, and the preset's otherwise.

    Returns:
        The model. Close it, or use it as a context manager, to free its sessions.

    Raises:
        AccelError: The folder was not made by accel or its files differ from its manifest, the repository can't be
            downloaded or holds no deployable, the preset or an option doesn't exist, an option's value is invalid, or
            the device can't be used.
    """
    local = locate_deployable(str(folder), revision, subfolder, token)
    files = find_variant(local, None if dtype is None else str(dtype).removeprefix("torch."), str(folder))
    integrity.check_files(files, check)
    built = built_runtime(files)
    preset = _preset_for(built) if runtime == AUTO else runtime
    config = runtime_preset(preset, built, **options)
    if runtime == AUTO and "engine" not in options and config.engine == FUSED and config.device != "cpu":
        config = replace(config, engine=VERIFIED_ENGINE)  # nobody asked for it by name: fall back where it can't run
    check_provider(config.provider)
    integrity.warn_if_unverified(files)
    with remote_code.allowing(trust_remote_code):
        model = open_model(local, config, files.dtype)
    source: dict[str, Any] = {"dtype": dtype, "revision": revision, "subfolder": subfolder, "token": token}
    trust: dict[str, Any] = {"check": check, "trust_remote_code": trust_remote_code}
    model.reopen = partial(load, folder, runtime, **source, **trust, **options)
    return model


def locate_deployable(name: str, revision: str | None = None, subfolder: str = "", token: str | None = None) -> Path:
    """Return the local folder of a deployable, downloaded from the hub if it isn't one.

    Args:
        name: Local folder, or the id of a repository on the Hugging Face hub.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside.
        token: Access token for the hub.

    Raises:
        AccelError: It doesn't exist or can't be downloaded.
    """
    local = Path(name).expanduser()
    if not local.exists():
        if not HUB_ID.fullmatch(name):
            raise AccelError(f"{name!r} is neither a folder nor the id of a repository on the Hugging Face hub")
        pattern = f"{subfolder}/*" if subfolder else "*"
        try:
            local = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=[pattern]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise AccelError(
                f"{name!r}{at} is no local folder, and can't be downloaded from the Hugging Face hub: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return local / subfolder


def _preset_for(built: Mapping[str, Any] | None) -> str:
    """Return the preset that a deployable was built for, if it can run here, and the fastest preset otherwise."""
    best = fastest()
    if built is None or built.get("name") not in group_files("runtime"):
        return best
    built_for_cpu = built.get("device") == "cpu"
    return str(built["name"]) if built_for_cpu == (best == "cpu") else best
