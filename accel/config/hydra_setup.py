"""What Hydra must know before it composes: the types of the configuration, and packages that bring YAML files.

https://hydra.cc/docs/tutorials/structured_config/schema/ and https://hydra.cc/docs/advanced/search_path/
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from accel.config import packages
from accel.config.schema import Config


class InstalledConfigs(SearchPathPlugin):
    """Appends every package that an entry point of the group `accel.conf` names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for point in packages.installed():
            search_path.append(provider=point.name, path=f"pkg://{point.value}")


def register() -> None:
    """Register the types and the installed packages with Hydra. Idempotent.

    `generate` alone takes keys that the types don't list: they are checked against `GenerationConfig` instead. Raises
    `AccelError` if a package can't be read, or brings a file that another one has: Hydra would take the first.
    """
    node = OmegaConf.structured(Config)
    OmegaConf.set_struct(node.generate, False)
    ConfigStore.instance().store(name="schema", node=node)
    if InstalledConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledConfigs)
    packages.owners()


@contextmanager
def composing() -> Iterator[Any]:
    """Context in which `hydra.compose` composes accel's configuration; it holds the loader of its files.

    Inside accel's own application that is so already. Inside somebody else's, theirs is there again afterwards.
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
    if not instance.is_initialized():
        return False
    sources = instance.config_loader().get_search_path().get_path()
    return any(source.provider == "main" and source.path == f"pkg://{packages.OWN}" for source in sources)
