"""PEFT adapters: trained changes of a checkpoint's weights, kept in a folder of their own and merged before export.

`peft` is optional, so it is imported where an adapter is used.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from accel.errors import AccelError, unknown
from accel.models.model_class import model_class

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Values of `peft_type` whose merging is tested. Others can't be merged (virtual tokens), open further folders that the
# adapter's config names (X-LoRA), or compile code (BOFT).
MERGEABLE = (
    "ADALORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "OFT",
    "TRAINABLE_TOKENS",
    "VERA",
)
NAME = "default"  # PEFT's name of an adapter that has none
TOLERANCE = 1e-3  # of the merged model's logits, relative to the largest; FP32 differs by about 1e-6


def files(name: str) -> tuple[str, str]:
    """Return the paths of the two files that are read of the adapter in folder `name`."""
    folder = Path(name).expanduser()
    return str(folder / CONFIG), str(folder / WEIGHTS)


def check(name: str) -> None:
    """Check an adapter by itself, without the model that it is for.

    Args:
        name: Value of `model.peft_adapter`.

    Raises:
        AccelError: The folder or a file is missing or damaged, the weights are pickled, the adapter is of a type that
            can't be merged, or `peft` isn't installed.
    """
    key, folder = f"model.peft_adapter={name}", Path(name).expanduser()
    if not name:
        raise AccelError("model.peft_adapter='': must be the folder of a PEFT adapter, or null for none")
    if not folder.is_dir():
        raise AccelError(
            f"{key}: this folder doesn't exist. An adapter on the Hugging Face hub is downloaded by "
            "hf download ID --local-dir FOLDER"
        )
    values = _read_config(key, folder)
    if values.get("peft_type") not in MERGEABLE:
        raise unknown(f"type of adapter to merge in {key}", values.get("peft_type"), MERGEABLE)
    if values.get("megatron_config") is not None:  # PEFT would import the module that the config names
        raise AccelError(f"{key}: its {CONFIG} has megatron_config, for layers of Megatron: set that to null")
    if not (folder / WEIGHTS).is_file():
        reason = f"{PICKLE} is a pickle, which is not read" if (folder / PICKLE).is_file() else "no weights"
        raise AccelError(f"{key} holds no {WEIGHTS} ({reason}). PEFT writes one: PeftModel.save_pretrained(FOLDER)")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise AccelError(f"{folder / WEIGHTS} is damaged ({type(error).__name__}): download it again") from error
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise AccelError(f"{key} needs peft: pip install 'accel-onnx[lora]'") from error


def _read_config(key: str, folder: Path) -> dict[str, Any]:
    """Return the values of an adapter's config. Raises `AccelError` if it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise AccelError(f"{key} holds no {CONFIG}: not the folder of a PEFT adapter")
    try:
        values: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AccelError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return values


def base_model(name: str) -> str | None:
    """Return the checkpoint that the adapter in folder `name` was trained for, as its config calls it, or None."""
    return _read_config(f"model.peft_adapter={name}", Path(name).expanduser()).get("base_model_name_or_path")


def check_fits(name: str, config: PretrainedConfig) -> None:
    """Check that an adapter can be merged into a model, by trying it on the model without weights.

    Args:
        name: Value of `model.peft_adapter`, checked.
        config: Hugging Face config of the model.

    Raises:
        AccelError: Modules or shapes of the adapter are not those of the model, or PEFT can't merge it.
    """
    with torch.device("meta"):
        model = model_class(config)(copy.deepcopy(config))  # PEFT may change the config
    shapes = _shapes(model)
    with _naming(name):
        merged = _attach(model, name, initialize=False).merge_and_unload()
        if _shapes(merged) != shapes:
            raise ValueError("it adds or removes layers (layer_replication)")


def merge(model: PreTrainedModel, name: str, inputs: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a model with an adapter merged into its weights, which keep their dtypes.

    The product of an adapter's matrices is added in FP32. In half precision, the sum is rounded once.

    Args:
        model: The model, on the CPU; changed in place.
        name: Value of `model.peft_adapter`, checked.
        inputs: Inputs of the model, [1, ...], on which the merged model is compared with the one that has the adapter
            beside its weights.

    Raises:
        AccelError: The adapter doesn't fit, or the merged model computes something else.
    """
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    with _naming(name), torch.no_grad():
        attached = _attach(model.float(), name)
        expected = attached.get_base_model()(**inputs).logits  # [1, length, vocabulary]
        merged: PreTrainedModel = attached.merge_and_unload()
        difference = float((merged(**inputs).logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # NaN, too
        raise AccelError(
            f"model.peft_adapter={name} can't be merged: logits of the merged model differ by {difference:.2g} of the "
            "largest. This happens where the adapter changes one of several layers that share a weight "
            "(tie_word_embeddings in config.json), or holds NaN"
        )
    for key, tensor in merged.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[key])
    return merged


def _attach(model: PreTrainedModel, name: str, initialize: bool = True) -> Any:
    """Return a `PeftModel` over `model`, with the adapter's layers and weights.

    It is what `PeftModel.from_pretrained` does, which only warns of weights that are missing and says nothing about
    those that no layer takes.

    Args:
        model: The model, in which layers are replaced.
        name: Value of `model.peft_adapter`.
        initialize: Initialize as the adapter's config says. PiSSA decomposes the model's weights for that.
    """
    import peft

    folder = Path(name).expanduser()
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    if not initialize and hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    attached = peft.PeftModel(model, config, NAME)
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    loaded = attached.load_adapter(str(folder), NAME, torch_device="cpu", key_mapping=mapping)
    for keys, problem in (
        (loaded.unexpected_keys, "the model has no layer for weights of the adapter"),
        (loaded.missing_keys, "the adapter lacks weights for layers that its config names"),
    ):
        if keys:
            raise ValueError(f"{problem}: {len(keys)}, the first of them {keys[0]}")
    return attached


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight."""
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Open a context without warnings, whose errors, of any class of PEFT's or torch's, become an `AccelError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].startswith("Error(s) in loading"):  # torch's heading over a list of errors
            lines = lines[1:]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        trained_for = base_model(name)
        advice = f". It was trained for {trained_for}" if trained_for else ""
        raise AccelError(
            f"model.peft_adapter={name} doesn't fit the model, or can't be merged into it: {reason}{advice}"
        ) from error
