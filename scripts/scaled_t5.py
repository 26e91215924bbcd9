"""Make a T5 that overflows in FP16 and not in FP32: the embedded model, its residual stream scaled up.

    python -m scripts.scaled_t5 FOLDER --factor 3e3 [--layers 12]

Writes a checkpoint with references, for `model=auto model.checkpoint=FOLDER model.references=heldout.tsv`.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from accel.models.checkpoints import BUILT_IN

EMBEDDED = BUILT_IN / "t5-g2p"
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "heldout.tsv")


def deep_t5(layers: int | None) -> T5ForConditionalGeneration:
    """Load the embedded T5, with more layers if asked for.

    It is a trained model because the logits of random ones are nearly tied, so that rounding would decide their tokens.
    Additional layers repeat the trained ones, their outputs scaled by 0.01, so that the model still transcribes words.

    Args:
        layers: Layers of the encoder and of the decoder; None for those of the embedded model.
    """
    small: T5ForConditionalGeneration = T5ForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    small.eval()
    if layers is None:
        return small
    config = T5Config(**small.config.to_dict() | {"num_layers": layers, "num_decoder_layers": layers})
    deep, small_state = T5ForConditionalGeneration(config), small.state_dict()
    deep.eval()
    state = {}
    for name in deep.state_dict():
        stack, _, rest = name.partition(".block.")
        if not rest:  # not part of a layer
            state[name] = small_state[name]
            continue
        layer, _, rest = rest.partition(".")
        layer_count = small.config.num_layers if stack == "encoder" else small.config.num_decoder_layers
        trained = int(layer_count or 0)
        is_first_copy = int(layer) * trained % layers < trained
        weight = small_state[f"{stack}.block.{int(layer) * trained // layers}.{rest}"]
        is_output = rest.endswith((".o.weight", ".wo.weight"))
        state[name] = weight if is_first_copy or not is_output else 0.01 * weight
    deep.load_state_dict(state)
    return deep


def scaled_t5(factor: float, layers: int | None = None) -> T5ForConditionalGeneration:
    """Return a T5 with a residual stream `factor` times as large, and the same outputs in FP32.

    RMS norm undoes the scale. The head is untied from the embedding first, so that the logits stay the same.

    Args:
        factor: Scale of the residual stream.
        layers: Layers of the encoder and of the decoder; None for those of the embedded model.
    """
    model = deep_t5(layers)
    model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.shared.weight.mul_(factor)
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(factor)
    return model


def save(folder: Path, factor: float, layers: int | None = None) -> None:
    """Write the checkpoint of a scaled T5, with tokenizer and references, into `folder`."""
    scaled_t5(factor, layers).save_pretrained(folder)
    for name in COPIED_FILES:
        shutil.copy(EMBEDDED / name, folder)


def main() -> None:
    """Write the checkpoint that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--factor", type=float, required=True, help="scale of the residual stream")
    parser.add_argument(
        "--layers", type=int, help="layers of encoder and decoder; default: those of the embedded model"
    )
    arguments = parser.parse_args()
    save(arguments.folder, arguments.factor, arguments.layers)


if __name__ == "__main__":
    main()
