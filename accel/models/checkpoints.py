"""A checkpoint as a folder on this machine, wherever it comes from, and the PyTorch model in it."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from accel.config.schema import ModelConfig
from accel.errors import AccelError
from accel.models.model_class import model_class, obstacle

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
