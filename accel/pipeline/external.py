"""Pretrained checkpoint as the first artifact, used in its own folder outside the store."""

from pathlib import Path

from accel.config.schema import ModelConfig
from accel.errors import AccelError
from accel.models.checkpoints import WEIGHTS, locate
from accel.pipeline.store import Artifact, Manifest, folder_files
from accel.system.hashing import make_key


def pretrained_artifact(model: ModelConfig) -> Artifact:
    """Return a pretrained checkpoint as an artifact: its own folder, not copied, with the hash of its files as the key.

    Raises:
        AccelError: If the checkpoint can't be found or has no weights.
    """
    folder = locate(model)
    files = folder_files(folder)
    if not any(Path(name).match(pattern) for name in files for pattern in WEIGHTS):
        raise AccelError(f"checkpoint {str(folder)!r} holds no weights ({' or '.join(WEIGHTS)})")
    key = make_key(files={name: record.sha256 for name, record in files.items()})
    manifest = Manifest(
        stage="checkpoint",
        key=key,
        upstream={},
        config={},
        packages={},
        seconds=0.0,
        peak_memory=0,
        added_memory=0,
        summary={},
        files=files,
    )
    return Artifact(folder, manifest)
