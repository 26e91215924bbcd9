"""Finds architectures: built in, installed with another package, or registered by hand. The only instantiate() call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from accel.adapters.types import Architecture
from accel.config.hydra_setup import composing
from accel.errors import AccelError

GROUP = "architecture"


def register(name: str, target: Callable[..., Architecture], **options: Any) -> None:
    """Add an architecture from Python: `target(**options)` makes it, `architecture=name` chooses it.

    `target` must be importable by its name, as a class of a module or notebook is. Raises `AccelError` if the name is
    taken or `options` lacks `model_types`.
    """
    if name in names() or name == "auto":
        raise AccelError(f"architecture {name!r} is already registered; choose a name other than {', '.join(names())}")
    if not options.get("model_types"):
        raise AccelError(f"architecture {name!r}: model_types=[...] is missing: the config.model_type values it serves")
    path = f"{target.__module__}.{target.__qualname__}"
    ConfigStore.instance().store(name=name, group=GROUP, node={"_target_": path, **options}, provider="accel.register")


def names() -> list[str]:
    """Every architecture that can be chosen, `auto` aside."""
    with composing() as loader:
        return [name for name in loader.get_group_options(GROUP, ObjectType.CONFIG) if name != "auto"]


def served() -> dict[str, Sequence[str]]:
    """Architecture -> the model types it serves."""
    with composing() as loader:
        found = {name: loader.repository.load_config(f"{GROUP}/{name}") for name in names()}
    return {name: tuple(result.config.get("model_types", ())) for name, result in found.items() if result}


def choose(model_type: str) -> str | None:
    """The architecture whose YAML names `model_type`, if any does. Raises `AccelError` if several do."""
    found = [name for name, types in served().items() if model_type in types]
    if len(found) > 1:
        raise AccelError(
            f"model type {model_type!r} is named by {', '.join(found)}: choose, as in architecture={found[0]}"
        )
    return found[0] if found else None


def model_types() -> list[str]:
    """Every model type that some architecture names."""
    return sorted({kind for types in served().values() for kind in types})


def build(config: Mapping[str, Any]) -> Architecture:
    """The adapter that a resolved `architecture` config describes."""
    if "_target_" not in config:
        raise AccelError(f"architecture: _target_ is missing from {dict(config)}")
    try:
        adapter = hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")
    except Exception as error:  # whatever the adapter's constructor raises is a mistake in its YAML
        raise AccelError(f"architecture {config['_target_']}: {error.__cause__ or error}") from error
    if not isinstance(adapter, Architecture):
        missing = [
            name
            for name in ("model_types", "roles", "wrap", "signature", "sample_inputs")
            if not hasattr(adapter, name)
        ]
        raise AccelError(f"architecture {config['_target_']} is no Architecture: it lacks {', '.join(missing)}")
    return adapter
