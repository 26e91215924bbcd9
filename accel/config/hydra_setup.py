"""Registration of the schema and of installed configuration packages with Hydra, before it composes.

https://hydra.cc/docs/tutorials/structured_config/schema/ and https://hydra.cc/docs/advanced/search_path/
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from accel.config import packages
from accel.config.schema import Config
from accel.errors import AccelError


class InstalledConfigs(SearchPathPlugin):
    """Hydra plugin that appends the packages named by entry points of the group `accel.conf` to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append every installed package, in the order of `packages.installed`."""
        for point in packages.installed():
            search_path.append(provider=point.name, path=f"pkg://{point.value}")


def register() -> None:
    """Register the schema and the installed configuration packages with Hydra. Idempotent.

    Only `generate` and `serve.models` accept keys that the schema lacks: `accel.cli.validate` checks the former against
    transformers' `GenerationConfig`, and the latter are names that the user chooses.

    Raises:
        AccelError: If a package can't be read, or holds a file that another one holds too: Hydra would silently take
            the first.
    """
    node = OmegaConf.structured(Config)
    OmegaConf.set_struct(node.generate, False)
    OmegaConf.set_struct(node.serve.models, False)
    ConfigStore.instance().store(name="schema", node=node)
    if InstalledConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledConfigs)
    packages.owners()


def check_choices(overrides: Sequence[str]) -> None:
    """Check that overrides of config groups, such as `runtime=cpu`, name files; Hydra raises errors without a key.

    Args:
        overrides: Overrides as on the command line.

    Raises:
        AccelError: A group is given a number, null or the like.
        OverrideParseException: Hydra can't parse an override.
    """
    groups = {name.partition("/")[0] for name in packages.owners()}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        value = override.value()
        names = value if isinstance(value, list) and value else [value]
        if not isinstance(value, dict) and not all(map(_is_name, names)):
            choices = ", ".join(sorted(packages.group_files(override.key_or_group)))
            raise AccelError(f"{override.input_line}: must be one of {choices}")


def _is_name(value: Any) -> bool:
    """Return whether a value can name a file of a config group."""
    return isinstance(value, str) and "${" not in value


@contextmanager
def composing() -> Iterator[Any]:
    """Open a context in which `hydra.compose` composes accel's configuration.

    Inside accel's own Hydra application nothing changes. Inside another one, its configuration is restored at the end.

    Yields:
        Hydra's loader of the configuration files.
    """
    instance = GlobalHydra.instance()
    if _is_ours(instance):
        yield instance.config_loader()
        return
    register()
    outer = instance.hydra
    instance.clear()
    try:
        with hydra.initialize_config_module(packages.OWN, version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        instance.hydra = outer


def _is_ours(instance: GlobalHydra) -> bool:
    """Return whether Hydra is initialized with accel's configuration."""
    if not instance.is_initialized():
        return False
    sources = instance.config_loader().get_search_path().get_path()
    return any(source.provider == "main" and source.path == f"pkg://{packages.OWN}" for source in sources)
