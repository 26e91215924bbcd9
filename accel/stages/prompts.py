"""Make prompts for models with a tokenizer where the user gives no texts: passages, questions, the model's own text.

Only a model without a chat template generates here; one with a template answers the questions in the stage `answers`.

Reads:
    The checkpoint: config, weights, tokenizer; the sample texts of `accel.data`.

Writes:
    `prompts.json`: kind, text and ids of each prompt; empty where the model has references, no tokenizer, or inputs
    other than text.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.data import texts
from accel.data.corpus import sample_lines
from accel.data.pretrained import load_config
from accel.data.texts import Prompt
from accel.evaluation.component_runner import max_positions
from accel.models.checkpoints import load_model
from accel.models.generation import Generates
from accel.models.model_class import model_class
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

PROMPTS = "prompts.json"
CHAT = "chat"  # kind of the prompts that are questions
NEW_TOKENS = 48  # sampled after each question, or after the first token
SAMPLED_TEXTS = 8  # texts sampled from the first token on, where there is no chat template
MAX_TOKENS = 96  # of a passage or question


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `prompts.json`. Return the number of prompts and their kinds."""
    folder = inputs["checkpoint"].folder
    tokenizer = None if config.model.references else texts.load_tokenizer(folder)
    hf_config = load_config(folder)
    prompts: list[Prompt] = []
    if tokenizer is not None and getattr(model_class(hf_config), "main_input_name", "") == "input_ids":
        max_tokens = length_limit(hf_config, MAX_TOKENS)
        passages = _passages(tokenizer, bool(hf_config.is_encoder_decoder), max_tokens)
        others: Iterator[Prompt] = iter(())
        if not hf_config.is_encoder_decoder:  # an encoder-decoder needs a source, and the passages are that
            if getattr(tokenizer, "chat_template", None):
                others = _questions(tokenizer, max_tokens)
            else:
                others = _sampled(folder, config.runtime.device, tokenizer)
        for pair in zip_longest(others, passages):
            prompts += [prompt for prompt in pair if prompt is not None]
    texts.write_prompts(prompts, out / PROMPTS)
    return {"prompts": len(prompts), "kinds": sorted({prompt.kind for prompt in prompts})}


def _passages(tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool, max_tokens: int) -> Iterator[Prompt]:
    """Yield passages: an encoder reads all of one; a decoder-only model continues its first half."""
    for line in sample_lines("page.txt"):
        ids = tokenizer(line)["input_ids"][:max_tokens]
        yield Prompt("page", line, ids, len(ids) if is_encoder_decoder else max(1, len(ids) // 2))


def _questions(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Iterator[Prompt]:
    """Yield questions in the chat template."""
    for line in sample_lines("questions.txt"):
        ids = texts.encode(tokenizer, [line], chat=True)["input_ids"][0].tolist()[:max_tokens]
        yield Prompt(CHAT, line, ids, len(ids))


def _sampled(folder: Path, device: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Prompt]:
    """Yield texts that the model in `folder` generates from the first token on."""
    model = load_on(device, folder)
    first = _first_token(model, tokenizer)
    for ids in sample(model, tokenizer, [[first]] * SAMPLED_TEXTS):
        yield Prompt("sampled", str(tokenizer.decode(ids, skip_special_tokens=True)), ids, max(1, len(ids) // 4))


def load_on(device: str, folder: Path) -> Generates:
    """Return the PyTorch model in `folder` on a device."""
    model = load_model(folder)
    model.to(device=device)  # type: ignore[call-arg]
    return model


def length_limit(hf_config: PretrainedConfig, wanted: int) -> int:
    """Return `wanted` tokens, or one third of the model's positions where that is less.

    Prompt, sampled tokens, and tokens generated later get one third each.
    """
    return min(wanted, (max_positions(hf_config) or 3 * wanted) // 3)


def _first_token(model: Generates, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the id that a text begins with: BOS of the tokenizer or the model, else EOS, else 0."""
    for token in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def sample(model: Generates, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the ids of each prompt and its continuation at temperature 1, up to the end-of-sequence token."""
    torch.manual_seed(0)
    padding = int(tokenizer.pad_token_id or 0)
    batch = texts.pad([texts.unpadded(ids) for ids in prompts], padding, left=True)  # [prompts, longest]
    end_tokens = model.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length_limit(model.config, NEW_TOKENS),
        eos_token_id=end_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        sequences = model.generate(**on_device, generation_config=settings)
    answers = sequences[:, on_device["input_ids"].shape[1] :].tolist()
    stops = set(end_tokens if isinstance(end_tokens, list) else [end_tokens])
    completed = []
    for prompt, answer in zip(prompts, answers, strict=True):
        length = len(answer)
        for position, token in enumerate(answer):
            if token in stops:
                length = position + 1
                break
        completed.append([*prompt, *answer[:length]])
    return completed


STAGE = Stage(
    name="prompts",
    run=run,
    inputs=takes("checkpoint"),
    sections=("model", "runtime.device"),
    packages=("torch", "transformers", "tokenizers"),
    files=lambda config: tuple(map(str, texts.SAMPLE_FILES)),
)
