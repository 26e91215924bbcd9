"""A T5 that FP16 breaks and FP32 doesn't notice: the embedded model with a residual stream of another scale.

    python -m scripts.scaled_t5 FOLDER --factor 3e3 [--layers 12]

Writes a checkpoint, with its words, for `model=auto model.checkpoint=FOLDER model.references=heldout.tsv`.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from accel.models.checkpoints import BUILT_IN

EMBEDDED = BUILT_IN / "t5-g2p"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "heldout.tsv")


def deep_t5(layers: int | None) -> T5ForConditionalGeneration:
    """The embedded T5, a trained model, because its tokens are not ties that rounding decides; with `layers` layers.

    The further ones repeat the trained ones and add little to the residual stream, so that it still says words.
    """
    small: T5ForConditionalGeneration = T5ForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    small.eval()
    if layers is None:
        return small
    config = T5Config(**small.config.to_dict() | {"num_layers": layers, "num_decoder_layers": layers})
    deep, known = T5ForConditionalGeneration(config), small.state_dict()
    deep.eval()
    state = {}
    for name in deep.state_dict():
        stack, _, rest = name.partition(".block.")
        if not rest:
            state[name] = known[name]
            continue
        layer, _, rest = rest.partition(".")
        layer_count = small.config.num_layers if stack == "encoder" else small.config.num_decoder_layers
        trained = int(layer_count or 0)
        first = int(layer) * trained % layers < trained
        weight = known[f"{stack}.block.{int(layer) * trained // layers}.{rest}"]
        state[name] = weight if first or not rest.endswith((".o.weight", ".wo.weight")) else 0.01 * weight
    deep.load_state_dict(state)
    return deep


def scaled_t5(factor: float, layers: int | None = None) -> T5ForConditionalGeneration:
    """A T5 with a residual stream `factor` times as large. RMS norm undoes it: FP32 outputs are the same.

    The head is untied first, so that the logits stay as they are.
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
    """Write the checkpoint of a scaled T5 and the words into `folder`."""
    scaled_t5(factor, layers).save_pretrained(folder)
    for name in BESIDE:
        shutil.copy(EMBEDDED / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--factor", type=float, required=True)
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    save(given.folder, given.factor, given.layers)


if __name__ == "__main__":
    main()
