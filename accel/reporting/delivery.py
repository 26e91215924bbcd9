"""Delivery of a deployable into the folder that the user names, where variants of one model lie side by side."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.models import integrity
from accel.pipeline.store import FileRecord, Manifest
from accel.reporting import card
from accel.runtime import layout


def check(target: Path) -> None:
    """Check that a deployable can be copied to `target`, before one is made.

    Raises:
        AccelError: It is a file, a folder of other things, or can't be written.
    """
    if target.exists() and not target.is_dir():
        raise AccelError(f"output={target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not layout.variants(target):
        raise AccelError(f"output={target} is not empty and holds no deployable: name another folder")
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise AccelError(f"output={target}: {existing} is no folder that you may write to")


def deliver(source: Path, target: Path) -> None:
    """Copy a deployable into a folder, beside variants of the same model in other dtypes.

    The variant of the same dtype is replaced. Files are copied, not linked: onnx refuses weights in a file with more
    than one hard link.

    Args:
        source: Artifact of `verify`.
        target: Folder; created if need be.

    Raises:
        AccelError: The folder holds another model, damaged files, or files that aren't a deployable's.
    """
    files = layout.first_variant(source)
    placed = layout.DeployableFiles(target, files.dtype, files.has_encoder)
    check(target)
    if layout.variants(target):
        _check_same_model(source, target, placed)
    for path in _own_files(placed):
        path.unlink()
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(layout.MANIFEST))
    shutil.copyfile(source / layout.MANIFEST, placed.own_manifest)
    layout.declare_external_data(target)
    for variant in layout.variants(target):
        _record_config(variant)
    card.write(target)


def _record_config(variant: layout.DeployableFiles) -> None:
    """Enter config.json, which lists the external data of all variants, in a variant's verification and manifest."""
    sha256 = FileRecord.of(variant.folder / layout.CONFIG).sha256
    verification = json.loads(variant.verification.read_text(encoding="utf-8"))
    verification["files"][layout.CONFIG] = sha256
    variant.verification.write_text(json.dumps(verification, indent=1))
    manifest = Manifest.parse(variant.own_manifest.read_text(encoding="utf-8"))
    changed = {name: FileRecord.of(variant.folder / name) for name in (layout.CONFIG, variant.verification.name)}
    variant.own_manifest.write_text(replace(manifest, files={**manifest.files, **changed}).dump())


def _own_files(variant: layout.DeployableFiles) -> list[Path]:
    """Return the files that belong to one variant alone: graphs, external data and records."""
    graphs = [path for graph in variant.graphs for path in graph.parent.glob(f"{graph.name}*")]
    records = (variant.verification, variant.certificate, variant.certificate_page, variant.own_manifest)
    return [*graphs, *(path for path in records if path.is_file())]


def _check_same_model(source: Path, target: Path, placed: layout.DeployableFiles) -> None:
    """Raise `AccelError` unless `target` holds an undamaged deployable of the same model as `source`.

    Variants share config, tokenizer and processor files, so these have to be equal, and they have to be made from the
    same weights, with the same adapter merged into them; `placed` is about to be replaced.
    """
    if _config(source) != _config(target):
        raise AccelError(f"output={target} holds another model (its {layout.CONFIG} differs): name another folder")
    for variant in layout.variants(target):
        if variant.dtype == placed.dtype:
            continue
        integrity.check_files(variant, integrity.FAST)
        if _checkpoint_key(variant) != _checkpoint_key(layout.first_variant(source)):
            raise AccelError(
                f"output={target} holds a model with other weights (of another checkpoint, or with another "
                f"model.peft_adapter), in {variant.dtype}: name another folder"
            )
        verified, ours = (integrity.listed_files(each) for each in (variant, layout.first_variant(source)))
        for name in sorted(verified.keys() & ours.keys() - {layout.CONFIG}):
            if verified[name] != ours[name]:
                raise AccelError(
                    f"output={target} holds the model with another {name}, in {variant.dtype}: name another folder"
                )


def _checkpoint_key(variant: layout.DeployableFiles) -> str | None:
    """Return the key of the checkpoint that a variant was made from, by its certificate."""
    key: str | None = json.loads(variant.certificate.read_text(encoding="utf-8"))["checkpoint"].get("key")
    return key


def _config(folder: Path) -> dict[str, Any]:
    """Return config.json without the part that lists the folder's own files."""
    config: dict[str, Any] = json.loads((folder / layout.CONFIG).read_text(encoding="utf-8"))
    config.pop(layout.JS_CONFIG, None)
    return config
