"""The first artefact: a folder with a Hugging Face model. Local, from the hub, or random weights made once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from accel import console
from accel.adapters.types import Architecture
from accel.config.schema import Config, ModelConfig
from accel.errors import AccelError, unknown
from accel.models.model_class import model_class, obstacle
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact, Manifest, folder_files, make_key

BUILT_IN = Path(__file__).parents[1] / "data" / "checkpoints"
WEIGHTS = ("*.safetensors", "*.bin")
DESCRIPTION = ("*.json", "*.model", "*.txt", "*.tsv")


def locate(model: ModelConfig, *, weights: bool = True) -> Path:
    """The local folder of a pretrained checkpoint: a folder, a model that ships with accel, or a hub id.

    With `weights=False` only the description is fetched from the hub. Raises `AccelError`.
    """
    name = str(model.checkpoint)
    for folder in (Path(name).expanduser(), BUILT_IN / name.removeprefix("accel://")):
        if folder.is_dir() and (folder.parent != BUILT_IN or name.startswith("accel://")):
            if not (folder / "config.json").is_file():
                raise AccelError(f"checkpoint {name!r} holds no config.json: not a Hugging Face model folder")
            return folder.resolve()
    if name.startswith(("/", ".", "~", "accel://")) or name.count("/") > 1:
        raise AccelError(f"checkpoint folder {name!r} doesn't exist")
    return _download(name, model.revision, weights)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(DESCRIPTION)))
        for pattern in WEIGHTS if weights else ():  # safetensors if there are any, pickles only as the last resort
            snapshot_download(name, revision=revision, allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AccelError(
            f"can't get checkpoint {name!r} from the Hugging Face hub: {str(error).splitlines()[0]}\n"
            "Without the hub: model.checkpoint=FOLDER takes a local Hugging Face folder, and model.weights=random\n"
            "builds the model from its dimensions (for structure and latency, not text)."
        ) from error
    return folder


def model_config(model: ModelConfig) -> PretrainedConfig:
    """The Hugging Face config of what `model` names. Raises `AccelError` if there is none or its type is unknown."""
    try:
        if model.weights == "random" and model.config:
            values = dict(model.config)
            described: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            described = AutoConfig.from_pretrained(locate(model, weights=False))
        return described
    except (ValueError, KeyError) as error:
        raise AccelError(f"checkpoint {model.checkpoint!r}: {str(error).splitlines()[0]}") from error


def load_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str | None = "eager") -> PreTrainedModel:
    """The PyTorch model in `folder`, on the CPU, in evaluation mode. `attention=None`: as transformers chooses it.

    In FP16, transformers keeps in FP32 what the model's class names in `_keep_in_fp32_modules`.
    """
    config = AutoConfig.from_pretrained(folder)
    kind = model_class(config)
    if kind is None:
        raise AccelError(f"{folder / 'config.json'}: {obstacle(config)}")
    try:
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    except SafetensorError as error:
        raise AccelError(f"the weights in {str(folder)!r} are damaged: {error}") from error
    model.eval()
    return model


def pretrained(model: ModelConfig) -> Artifact:
    """A pretrained checkpoint where it lies: nothing is copied, the key is the hash of its files."""
    folder = locate(model)
    files = folder_files(folder)
    if not any(Path(name).match(pattern) for name in files for pattern in WEIGHTS):
        raise AccelError(f"checkpoint {str(folder)!r} holds no weights ({' or '.join(WEIGHTS)})")
    key = make_key(files={name: record.sha256 for name, record in files.items()})
    return Artifact(folder, Manifest("checkpoint", key, {}, {}, {}, 0.0, 0, 0, {}, files))


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Random weights: initialise on the CPU from the seed and save."""
    description = model_config(config.model)
    torch.manual_seed(config.model.seed)
    with torch.device("cpu"):
        model = model_class(description)(description)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.note(f"random weights: {parameters / 1e6:.1f} M parameters from seed {config.model.seed}")
    return {"parameters": parameters}


def reference_files(config: Config) -> tuple[str, ...]:
    """Texts and references outside the checkpoint's folder: their content counts, as the checkpoint's own does."""
    path = config.model.references
    own = [path] if path is not None and Path(path).is_absolute() else []
    return (*own, *(given for given in (config.verify.texts, config.verify.targets) if given is not None))


def check(model: ModelConfig) -> None:
    """Raises `AccelError` if `model` can't name a checkpoint."""
    if model.weights not in ("pretrained", "random"):
        raise unknown("model.weights", model.weights, ("pretrained", "random"))
    if not model.checkpoint and not (model.weights == "random" and model.config):
        raise AccelError(f"model={model.name}: model.checkpoint is missing; give a folder or a hub id")


def described_by(config: Config) -> tuple[str, ...]:
    """The file that random weights take their dimensions from, unless `model.config` holds them."""
    return () if config.model.config else (str(locate(config.model, weights=False) / "config.json"),)


STAGE = Stage(
    name="checkpoint",
    run=run,
    inputs=takes(),
    sections=("model",),
    packages=("torch", "transformers"),
    files=described_by,
)
