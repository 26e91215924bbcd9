"""Delivery of a deployable into the folder that the user names, where variants of one model lie side by side."""

import json
import shutil
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.reporting import card
from accel.runtime import layout


def deliver(source: Path, target: Path) -> None:
    """Copy a deployable into a folder, beside variants of the same model in other dtypes.

    The variant of the same dtype is replaced. Files are copied, not linked: onnx refuses weights in a file with more
    than one hard link.

    Args:
        source: Artifact of `verify`.
        target: Folder; created if need be.

    Raises:
        AccelError: The folder holds another model, or files that aren't a deployable's.
    """
    files = layout.first_variant(source)
    if target.is_dir() and any(target.iterdir()):
        _check_same_model(source, target)
    elif target.exists() and not target.is_dir():
        raise AccelError(f"output={target} is a file, not a folder")
    placed = layout.DeployableFiles(target, files.dtype, files.has_encoder)
    for path in card.files_of(placed):
        path.unlink()
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(layout.MANIFEST))
    shutil.copyfile(source / layout.MANIFEST, placed.manifest)
    layout.declare_external_data(target)
    card.write(target)


def _check_same_model(source: Path, target: Path) -> None:
    """Raise `AccelError` unless `target` holds a deployable with the config of `source`."""
    if not layout.variants(target):
        raise AccelError(f"output={target} is not empty and holds no deployable: name another folder")
    if _config(source) != _config(target):
        raise AccelError(f"output={target} holds another model (its config.json differs): name another folder")


def _config(folder: Path) -> dict[str, Any]:
    """Return config.json without the part that lists the folder's own files."""
    config: dict[str, Any] = json.loads((folder / layout.CONFIG).read_text(encoding="utf-8"))
    config.pop(layout.JS_CONFIG, None)
    return config
