"""Let the model answer the questions among the prompts, for calibration, which runs on whole conversations.

Random ids alone are a poor calibration set, because a trained model's activations there are unlike those on text. In
FP32 nothing is calibrated, and this stage doesn't run.

Reads:
    The checkpoint: weights, tokenizer; `prompts.json` of `prompts`.

Writes:
    `answers.json`: the same prompts, the questions followed by the ids that the model sampled.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.data import texts
from accel.data.pretrained import load_tokenizer
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.stages.prompts import CHAT, PROMPTS, load_on, sample

ANSWERS = "answers.json"


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `answers.json`. Return the number of questions answered."""
    folder = inputs["checkpoint"].folder
    prompts = texts.read_prompts(inputs["prompts"].folder / PROMPTS)
    questions = [prompt for prompt in prompts if prompt.kind == CHAT]
    if questions:
        model = load_on(config.runtime.device, folder)
        answered = iter(sample(model, load_tokenizer(folder), [prompt.ids for prompt in questions]))
        prompts = [replace(prompt, ids=next(answered)) if prompt.kind == CHAT else prompt for prompt in prompts]
    texts.write_prompts(prompts, out / ANSWERS)
    return {"questions": len(questions)}


def read_answers(folder: Path) -> list[texts.Prompt]:
    """Return the prompts in `answers.json`, with answers."""
    return texts.read_prompts(folder / ANSWERS)


STAGE = Stage(
    name="answers",
    run=run,
    inputs=takes("checkpoint", "prompts"),
    sections=("runtime.device",),
    packages=("torch", "transformers", "tokenizers"),
)
