"""Configuration that other packages bring: their architectures and models beside ours, on Hydra's search path.

A package names the folder of its YAML files, a Python package, under the entry-point group `accel.conf`:

    [project.entry-points."accel.conf"]
    mine = "my_package.conf"

Of its code only the `__init__.py` on the way to that folder are imported until one of its files is chosen.
https://hydra.cc/docs/advanced/search_path/ and https://packaging.python.org/en/latest/specifications/entry-points/
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from accel.errors import AccelError

GROUP = "accel.conf"
OWN = "accel.conf"  # the package of ours


class InstalledConfigs(SearchPathPlugin):
    """Appends every package that an entry point names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for point in installed():
            search_path.append(provider=point.name, path=f"pkg://{point.value}")


def installed() -> list[EntryPoint]:
    """The entry points of the group, in one order everywhere."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def register() -> None:
    """Let Hydra ask the installed packages. Idempotent.

    Raises `AccelError` if a package can't be read, or brings a file that another one has: Hydra would take the first.
    """
    if InstalledConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledConfigs)
    owners = dict.fromkeys(_names(OWN), OWN)
    for point in installed():
        try:
            brought = list(_names(point.value))
        except (ImportError, TypeError, OSError) as error:
            raise AccelError(
                f"entry point {point.name} = {point.value!r} ({GROUP}) names no package of YAML files: {error}"
            ) from error
        for name in brought:
            if name in owners:
                raise AccelError(f"{name} is in both {owners[name]} and {point.value}: one of them needs another name")
            owners[name] = point.value


def _names(package: str) -> Iterator[str]:
    """`group/file.yaml` for every file one folder below the package."""
    for group in files(package).iterdir():
        if group.is_dir():
            yield from (f"{group.name}/{file.name}" for file in group.iterdir() if file.name.endswith(".yaml"))
