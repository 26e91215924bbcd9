"""Packages of configuration files: accel's own, and those of other installed distributions.

A distribution names the folder of its YAML files, a Python package, under the entry-point group `accel.conf`:

    [project.entry-points."accel.conf"]
    mine = "my_package.conf"

Only the `__init__.py` files on the way to that folder are imported, until one of its YAML files is chosen.
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
    """Return the entry points of the group `accel.conf`, sorted by name and value."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def yaml_files(point: EntryPoint) -> list[str]:
    """Return `group/file.yaml` for every YAML file of an installed package.

    Args:
        point: Entry point that names the package.

    Raises:
        AccelError: If the package can't be read.
    """
    try:
        return list(_files_below(point.value))
    except (ImportError, TypeError, OSError) as error:
        raise AccelError(
            f"entry point {point.name} = {point.value!r} of the group {GROUP} must name a package of YAML files, which "
            f"can't be read: {error}. Reinstall or uninstall the distribution that declares it"
        ) from error


def owners() -> dict[str, str]:
    """Map every `group/file.yaml` to the package that holds it.

    Raises:
        AccelError: If a package can't be read, or two packages hold a file of the same name.
    """
    owner_of = dict.fromkeys(_files_below(OWN), OWN)
    for point in installed():
        for name in yaml_files(point):
            if name in owner_of:
                raise AccelError(
                    f"{name} is in both {owner_of[name]} and {point.value}: rename the file in one, or uninstall one"
                )
            owner_of[name] = point.value
    return owner_of


def group_files(group: str) -> dict[str, Traversable]:
    """Map every choice of a config group to its YAML file.

    Args:
        group: Name of the group, such as `runtime`.

    Raises:
        AccelError: As `owners` does.
    """
    choices = {}
    for path, package in owners().items():
        folder, _, file = path.partition("/")
        if folder == group:
            choices[file.removesuffix(".yaml")] = files(package).joinpath(folder, file)
    return choices


def _files_below(package: str) -> Iterator[str]:
    """Yield `group/file.yaml` for every YAML file one folder below the package's."""
    for group in files(package).iterdir():
        if group.is_dir():
            for file in group.iterdir():
                if file.name.endswith(".yaml"):
                    yield f"{group.name}/{file.name}"
