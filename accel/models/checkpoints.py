"""Checkpoints as local folders, wherever they come from, and the PyTorch models in them."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from accel.config.schema import ModelConfig
from accel.data.pretrained import load_config
from accel.errors import AccelError
from accel.models import peft_adapter
from accel.models.model_class import model_class, obstacle
from accel.system import remote_code
from accel.system.process_state import environment

BUILT_IN = Path(__file__).parents[1] / "data" / "checkpoints"  # folders of the checkpoints that ship with accel
BUILT_IN_PREFIX = "accel://"
# Patterns of files on the hub, in order of preference: pickles are downloaded only where there are no safetensors.
WEIGHTS = ("*.safetensors", "*.bin")
CONFIG_AND_TOKENIZER = ("*.json", "*.model", "*.txt", "*.tsv", "*.jinja", "README.md")  # the card names the licence
CODE = "*.py"  # downloaded only where the user trusts it
# Threads load weights into heaps of their own, which keep 100 MB when the model is freed.
ONE_LOADING_THREAD = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}


def locate(model: ModelConfig, *, weights: bool = True) -> Path:
    """Return the local folder of a pretrained checkpoint, downloaded from the hub where needed.

    Args:
        model: Model config. Its `checkpoint` is a local folder, a checkpoint that ships with accel (`accel://NAME`), or
            a model id on the Hugging Face hub.
        weights: Download the weights too. Otherwise the hub is only asked for configuration and tokenizer files.

    Raises:
        AccelError: The folder doesn't exist, has no config.json or holds a PEFT adapter, or the download failed.
    """
    name = str(model.checkpoint)
    built_in = name.startswith(BUILT_IN_PREFIX)
    for folder in (Path(name).expanduser(), BUILT_IN / name.removeprefix(BUILT_IN_PREFIX)):
        # a checkpoint that ships with accel needs the prefix: its bare name is a model id on the hub
        if folder.is_dir() and (built_in or folder.parent != BUILT_IN):
            _refuse_adapter(name, folder)
            if not (folder / "config.json").is_file():
                raise AccelError(f"model.checkpoint={name} holds no config.json: not a Hugging Face model folder")
            if model.revision is not None:
                raise AccelError(
                    f"model.revision={model.revision}: {name!r} is a folder, and only repositories on the Hugging Face "
                    "hub have revisions"
                )
            return folder.resolve()
    if name.startswith(("/", ".", "~", BUILT_IN_PREFIX)) or name.count("/") > 1:  # can't be a model id on the hub
        raise AccelError(f"model.checkpoint={name}: this folder doesn't exist")
    return _download(name, model.revision, weights)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """Download a checkpoint from the hub and return its folder in the hub's local cache."""
    try:
        patterns = [*CONFIG_AND_TOKENIZER, CODE] if remote_code.is_allowed() else list(CONFIG_AND_TOKENIZER)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if weights:
            for pattern in WEIGHTS:
                snapshot_download(name, revision=revision, allow_patterns=[pattern])
                if any(folder.glob(pattern)):
                    break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AccelError(
            f"model.checkpoint={name}: can't download it from the Hugging Face hub: {str(error).splitlines()[0]}\n"
            "Without the hub: model.checkpoint=FOLDER uses a local Hugging Face folder; model.weights=random builds\n"
            "the model with random weights from its config (for graph structure and latency, not for text)."
        ) from error
    _refuse_adapter(name, folder)
    return folder


def _refuse_adapter(name: str, folder: Path) -> None:
    """Raise `AccelError` if a checkpoint is a PEFT adapter: transformers would load the model that it names."""
    if (folder / peft_adapter.CONFIG).is_file():
        raise AccelError(
            f"model.checkpoint={name} holds a PEFT adapter ({peft_adapter.CONFIG}): give its folder as "
            "model.peft_adapter=FOLDER, and the model that it was trained for as model.checkpoint"
        )


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a checkpoint from the Hugging Face hub, whose cache names the folder by it; else None."""
    return folder.name if folder.parent.name == "snapshots" else None


def model_config(model: ModelConfig) -> PretrainedConfig:
    """Return the Hugging Face config of the model that `model` names.

    Raises:
        AccelError: There is no such config, or transformers doesn't know its model type.
    """
    try:
        if model.weights == "random" and model.config:
            values = dict(model.config)
            config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            with remote_code.allowing(model.trust_remote_code):
                config = load_config(locate(model, weights=False))
        return config
    except (ValueError, KeyError) as error:
        raise AccelError(f"checkpoint {model.checkpoint!r}: {str(error).splitlines()[0]}") from error


def load_model(
    folder: Path, dtype: torch.dtype | str = torch.float32, attention: str | None = "eager"
) -> PreTrainedModel:
    """Load the PyTorch model in `folder` on the CPU, in evaluation mode.

    Args:
        folder: Hugging Face model folder.
        dtype: Type of the weights; "auto" for the one they are stored in. In FP16, transformers keeps in FP32 the
            modules that the model's class names in `_keep_in_fp32_modules`.
        attention: transformers' `attn_implementation`; None for transformers' default.

    Raises:
        AccelError: accel can't export a model of this type, or the weights are damaged.
    """
    config = load_config(folder)
    transformers_class = model_class(config)
    if transformers_class is None:
        raise AccelError(f"{folder / 'config.json'}: {obstacle(config)}")
    try:
        with environment(ONE_LOADING_THREAD):
            model: PreTrainedModel = transformers_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, trust_remote_code=remote_code.is_allowed()
            )
    except Exception as error:  # of any class, depending on where a file is damaged
        damaged = _damaged_weights(folder)
        if damaged is None:
            raise
        raise AccelError(
            f"{damaged} is damaged, or holds objects other than tensors ({type(error).__name__}): download it again"
        ) from error
    model.eval()
    return model


def _damaged_weights(folder: Path) -> Path | None:
    """Return the first file of weights in a checkpoint that can't be read by itself, or None."""
    for pattern in WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            try:
                if path.suffix == ".safetensors":
                    with safe_open(path, "pt") as file:
                        file.keys()
                else:
                    torch.load(path, map_location="meta", weights_only=True)  # it refuses all but tensors
            except Exception:  # of any class, depending on the damage
                return path
    return None
