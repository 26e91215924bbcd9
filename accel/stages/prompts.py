"""What a model with a tokenizer is asked when nobody gives it texts: passages, questions, and text of its own.

Random ids are unlike anything a trained model was trained on: its activations there say little about real use.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.data import texts
from accel.data.corpus import sample_lines
from accel.data.texts import Prompt
from accel.evaluation.component_runner import longest
from accel.models.checkpoints import load_model
from accel.models.generation import Generates
from accel.models.model_class import model_class
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

PROMPTS = "prompts.json"
NEW_TOKENS = 48  # sampled after each question, or after the first token
SAMPLED = 8  # texts sampled from the first token on, where there is no chat template
LONGEST = 96  # tokens of a passage


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `prompts.json`: none where the model has references or no tokenizer, or takes something else than text."""
    folder = inputs["checkpoint"].folder
    tokenizer = None if config.model.references else texts.load_tokenizer(folder)
    found: list[Prompt] = []
    description = AutoConfig.from_pretrained(folder)
    if tokenizer is not None and getattr(model_class(description), "main_input_name", "") == "input_ids":
        third = (longest(description) or 3 * LONGEST) // 3  # for what is given, for what is sampled, for what follows
        most = min(LONGEST, third)
        page = _passages(tokenizer, bool(description.is_encoder_decoder), most)
        own: Iterator[Prompt] = iter(())
        if not description.is_encoder_decoder:  # what an encoder-decoder writes of itself follows from a passage
            model = load_model(folder)
            model.to(device=config.runtime.device)  # type: ignore[call-arg]
            own = _own(model, tokenizer, most, min(NEW_TOKENS, third))
        found = [prompt for prompt in chain(*zip_longest(own, page)) if prompt is not None]
    texts.write_prompts(found, out / PROMPTS)
    return {"prompts": len(found), "kinds": sorted({prompt.kind for prompt in found})}


def _passages(tokenizer: PreTrainedTokenizerBase, whole: bool, most: int) -> Iterator[Prompt]:
    """The page's passages. `whole`: the model reads one as a whole, otherwise it continues the first half of it."""
    for line in sample_lines("page.txt"):
        ids = tokenizer(line)["input_ids"][:most]
        yield Prompt("page", line, ids, len(ids) if whole else max(1, len(ids) // 2))


def _own(model: Generates, tokenizer: PreTrainedTokenizerBase, most: int, new: int) -> Iterator[Prompt]:
    """Text that the model writes at temperature 1: answers to questions in its chat template, or from nothing."""
    if getattr(tokenizer, "chat_template", None):
        questions = sample_lines("questions.txt")
        asked = [texts.encode(tokenizer, [line], chat=True)["input_ids"][0].tolist()[:most] for line in questions]
        for line, question, ids in zip(questions, asked, _sampled(model, tokenizer, asked, new), strict=True):
            yield Prompt("chat", line, ids, len(question))
        return
    begin = next(
        (one for one in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id) if one is not None),
        0,
    )
    for ids in _sampled(model, tokenizer, [[begin]] * SAMPLED, new):
        yield Prompt("sampled", str(tokenizer.decode(ids, skip_special_tokens=True)), ids, max(1, len(ids) // 4))


def _sampled(
    model: Generates, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Sequence[int]], new: int
) -> list[list[int]]:
    """Each of `asked` and what the model says to it, up to its end."""
    torch.manual_seed(0)
    batch = texts.pad([texts.unpadded(ids) for ids in asked], int(tokenizer.pad_token_id or 0), left=True)
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    given = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        written = model.generate(**given, generation_config=settings)[:, given["input_ids"].shape[1] :].tolist()
    stops = set(ends if isinstance(ends, list) else [ends])
    found = []
    for question, answer in zip(asked, written, strict=True):
        end = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
        found.append([*question, *answer[:end]])
    return found


STAGE = Stage(
    name="prompts",
    run=run,
    inputs=takes("checkpoint"),
    sections=("model", "runtime.device"),
    packages=("torch", "transformers", "tokenizers"),
    files=lambda config: tuple(map(str, texts.SAMPLE_FILES)),
)
