"""A pretrained checkpoint as the first artifact: it stays where it lies, outside the store."""

from pathlib import Path

from accel.config.schema import ModelConfig
from accel.errors import AccelError
from accel.models.checkpoints import WEIGHTS, locate
from accel.pipeline.store import Artifact, Manifest, folder_files
from accel.system.hashing import make_key


def pretrained(model: ModelConfig) -> Artifact:
    """A pretrained checkpoint where it lies: nothing is copied, the key is the hash of its files."""
    folder = locate(model)
    files = folder_files(folder)
    if not any(Path(name).match(pattern) for name in files for pattern in WEIGHTS):
        raise AccelError(f"checkpoint {str(folder)!r} holds no weights ({' or '.join(WEIGHTS)})")
    key = make_key(files={name: record.sha256 for name, record in files.items()})
    return Artifact(folder, Manifest("checkpoint", key, {}, {}, {}, 0.0, 0, 0, {}, files))
