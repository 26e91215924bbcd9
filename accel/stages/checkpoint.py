"""Provide the checkpoint, the pipeline's first artifact: a folder with a Hugging Face model.

Reads:
    `config.json` of the model, unless `model.config` holds the dimensions. A pretrained checkpoint (local or from the
    hub) without adapter is used where it is, and this stage doesn't run. With `model.peft_adapter`, the adapter's
    config and weights, and the whole pretrained checkpoint.

Writes:
    With `model.weights=random`, `config.json` and the weights, as `save_pretrained` does.
    With `model.peft_adapter`, the same with the adapter merged into the weights; and the other files of the pretrained
    checkpoint that stages read, such as the tokenizer's.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import Config, ModelConfig
from accel.errors import AccelError, unknown
from accel.models import peft_adapter
from accel.models.checkpoints import CODE, CONFIG_AND_TOKENIZER, hub_commit, load_model, locate, model_config
from accel.models.model_class import model_class
from accel.pipeline.external import pretrained_artifact
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

WEIGHT_INDEX = "*.index.json"
SAMPLE = 8  # tokens on which the merged model is compared with the one that has an adapter


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Save the model with random or merged weights. Return the number of parameters, and what was merged.

    Random weights are initialised on the CPU from `model.seed`.
    """
    hf_config = model_config(config.model)
    torch.manual_seed(config.model.seed)
    base: Path | None = None
    if config.model.weights == "random":
        with torch.device("cpu"):
            model = model_class(hf_config)(hf_config)
        progress.note(f"random weights: {model.num_parameters() / 1e6:.1f} M parameters from seed {config.model.seed}")
    else:
        base = locate(config.model)
        model = load_model(base, dtype="auto")
    summary: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    adapter = config.model.peft_adapter
    if adapter is not None:
        _note_other_base(config.model, adapter)
        model = peft_adapter.merge(model, adapter, _sample_inputs(architecture, hf_config, config.model.seed))
        summary["adapter"] = Path(adapter).expanduser().resolve().name
    if base is not None:
        summary["commit"] = hub_commit(base)
    model.save_pretrained(out)
    if base is not None:
        _copy_other_files(config.model, base, out)
    return summary


def _note_other_base(model: ModelConfig, adapter: str) -> None:
    """Tell the user if the adapter was trained for another model than `model.checkpoint`, by the end of its path."""
    trained_for = peft_adapter.base_model(adapter)
    if trained_for and model.checkpoint and Path(trained_for).name.lower() != Path(model.checkpoint).name.lower():
        progress.note(f"the adapter was trained for {trained_for}; it is merged into {model.checkpoint}")


def _sample_inputs(architecture: Architecture, hf_config: PretrainedConfig, seed: int) -> dict[str, Tensor]:
    """Return random inputs of the whole model, [1, ...]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = dict(architecture.sample_inputs(hf_config, 1, SAMPLE, generator))
    if hf_config.is_encoder_decoder:
        size = hf_config.get_text_config(decoder=True).vocab_size
        inputs["decoder_input_ids"] = torch.randint(size, (1, SAMPLE), generator=generator)
    return inputs


def _copy_other_files(model: ModelConfig, base: Path, out: Path) -> None:
    """Copy what else stages read of a checkpoint: tokenizer, generation config, card, references and trusted code."""
    for pattern in (*CONFIG_AND_TOKENIZER, *((CODE,) if model.trust_remote_code else ())):
        for path in base.glob(pattern):
            if path.name != "config.json" and not path.match(WEIGHT_INDEX):
                shutil.copyfile(path, out / path.name)
    if model.references is not None and not Path(model.references).is_absolute():
        (out / model.references).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / model.references, out / model.references)


def reference_files(config: Config) -> tuple[str, ...]:
    """Return the texts and references outside the checkpoint's folder, whose content counts for a stage's key.

    Files inside the folder count with the checkpoint's own content.
    """
    paths = []
    if config.model.references is not None and Path(config.model.references).is_absolute():
        paths.append(config.model.references)
    for path in (config.verify.texts, config.verify.targets):
        if path is not None:
            paths.append(path)
    return tuple(paths)


def check(model: ModelConfig) -> None:
    """Check that `model` names a checkpoint, and a PEFT adapter that can be read.

    Raises:
        AccelError: `model.weights` has an unknown value, `model.checkpoint` is missing, or the adapter can't be used.
    """
    if model.weights not in ("pretrained", "random"):
        raise unknown("model.weights", model.weights, ("pretrained", "random"))
    if not model.checkpoint and not (model.weights == "random" and model.config):
        raise AccelError(f"model={model.name}: model.checkpoint is missing; give a folder or a hub id")
    if model.peft_adapter is None:
        return
    peft_adapter.check(model.peft_adapter)
    if ".." in Path(model.references or "").parts:  # only files inside the checkpoint's folder are copied
        raise AccelError(
            f"model.references={model.references}: with model.peft_adapter, give an absolute path or one inside the "
            "checkpoint's folder"
        )


def source_files(config: Config) -> tuple[str, ...]:
    """Return the files and folders that the weights depend on.

    These are the adapter's files; and the folder of the pretrained checkpoint that they are merged into, or the
    `config.json` that random weights take their dimensions from, if `model.config` doesn't hold them.
    """
    model = config.model
    adapter = peft_adapter.files(model.peft_adapter) if model.peft_adapter is not None else ()
    if model.weights == "pretrained":
        return (str(pretrained_artifact(model).folder), *adapter)
    if model.config:
        return adapter
    return (str(locate(model, weights=False) / "config.json"), *adapter)


STAGE = Stage(
    name="checkpoint",
    run=run,
    inputs=takes(),
    sections=("model",),
    packages=("torch", "transformers", "peft"),
    files=source_files,
)
