"""A model's folder in a Triton model repository.

    REPO/NAME/config.pbtxt
    REPO/NAME/1/model.py
    REPO/NAME/1/deployable/

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from accel.config.export_triton import ExportTritonConfig
from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.models.loading import find_variant
from accel.reporting import delivery
from accel.serve.triton import config_file

MODEL, CONFIG, VERSION, DEPLOYABLE = "model.py", "config.pbtxt", "1", "deployable"
# Limits of requests in section `serve`; the others are about HTTP.
LIMITS = (
    *("max_waiting", "max_rows", "max_prompt_tokens", "max_new_tokens", "max_total_tokens", "default_new_tokens"),
    *("max_sequences", "timeout_s", "coalesce_s"),
)


def check(config: ExportTritonConfig, name: str) -> Path:
    """Return the folder that a model is going to be written to, before one is made.

    Args:
        config: Section `export_triton` of the configuration.
        name: Name of the model.

    Raises:
        AccelError: No repository is named, it is a file or can't be written, or holds a model of this name.
    """
    if not config.output:
        raise AccelError("stage=export_triton needs export_triton.output=REPO, the folder of a Triton model repository")
    repository = Path(config.output)
    key = f"export_triton.output={config.output}"
    if repository.exists() and not repository.is_dir():
        raise AccelError(f"{key} is a file, not a folder")
    folder = repository / name
    if folder.exists() or folder.is_symlink():
        raise AccelError(f"{key} holds {name} already: remove {folder}, or choose another folder or model.name")
    existing = next(each for each in (repository.absolute(), *repository.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise AccelError(f"{key}: {existing} is no folder that you may write to")
    return folder


def write(deployable: Path, target: Path, config: ExportTritonConfig, limits: ServeConfig, on_gpu: bool) -> None:
    """Write a model's folder. It appears under its name once it is complete, since Triton may watch the repository.

    Args:
        deployable: Artifact of `verify`. Its files are copied.
        target: The folder, which doesn't exist; its name becomes the model's.
        config: Section `export_triton` of the configuration.
        limits: Limits of requests.
        on_gpu: Instances run on GPUs.

    Raises:
        AccelError: The deployable doesn't take token ids.
    """
    ids = config_file.ids_type(find_variant(deployable))
    chosen = json.dumps({name: value for name, value in asdict(limits).items() if name in LIMITS})
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".accel-") as parent:
        folder = Path(parent) / target.name
        version = folder / VERSION
        version.mkdir(parents=True)
        delivery.deliver(deployable, version / DEPLOYABLE)
        shutil.copyfile(Path(__file__).with_name(MODEL), version / MODEL)
        text = config_file.config_text(target.name, ids, on_gpu, config.instances, chosen)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        folder.rename(target)
