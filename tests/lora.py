"""PEFT adapters with random weights, under which a model generates other tokens."""

from pathlib import Path

import peft
import torch
from transformers import PreTrainedModel


def save_adapter(model: PreTrainedModel, config: peft.PeftConfig, folder: Path, seed: int = 1) -> Path:
    """Save an adapter for `model`, which gets its layers. Its weights are random: PEFT's own are partly zero."""
    generator = torch.Generator().manual_seed(seed)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the adapter in `folder` merged as PEFT's documentation does it."""
    merged: PreTrainedModel = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged.eval()
