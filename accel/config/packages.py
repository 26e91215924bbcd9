"""Packages of YAML files: accel's own, and those that other distributions bring.

A distribution names the folder of its YAML files, a Python package, under the entry-point group `accel.conf`:

    [project.entry-points."accel.conf"]
    mine = "my_package.conf"

Of its code only the `__init__.py` on the way to that folder are imported until one of its files is chosen.
https://packaging.python.org/en/latest/specifications/entry-points/
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable

from accel.errors import AccelError

GROUP = "accel.conf"
OWN = "accel.conf"  # the package of accel's own files


def installed() -> list[EntryPoint]:
    """The entry points of the group, in one order everywhere."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def brought(point: EntryPoint) -> list[str]:
    """`group/file.yaml` for every file of an installed package. Raises `AccelError` if it can't be read."""
    try:
        return list(_names(point.value))
    except (ImportError, TypeError, OSError) as error:
        raise AccelError(
            f"entry point {point.name} = {point.value!r} ({GROUP}) names no package of YAML files: {error}"
        ) from error


def owners() -> dict[str, str]:
    """`group/file.yaml` -> the package that holds it. Raises `AccelError` where two packages hold the same."""
    found = dict.fromkeys(_names(OWN), OWN)
    for point in installed():
        for name in brought(point):
            if name in found:
                raise AccelError(f"{name} is in both {found[name]} and {point.value}: one of them needs another name")
            found[name] = point.value
    return found


def group_files(group: str) -> dict[str, Traversable]:
    """Name -> YAML file of every choice in a config group. Raises `AccelError` as `owners` does."""
    return {
        name.removeprefix(f"{group}/").removesuffix(".yaml"): files(package).joinpath(*name.split("/"))
        for name, package in owners().items()
        if name.startswith(f"{group}/")
    }


def _names(package: str) -> Iterator[str]:
    """`group/file.yaml` for every file one folder below the package."""
    for group in files(package).iterdir():
        if group.is_dir():
            yield from (f"{group.name}/{file.name}" for file in group.iterdir() if file.name.endswith(".yaml"))
