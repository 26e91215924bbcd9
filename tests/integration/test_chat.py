"""Decoder-only models: continuations of prompts, chat templates, and transformers' pipeline over accel's model."""

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from accel.cli.compose import compose, execute
from accel.errors import AccelError
from accel.models.loading import load
from accel.pipeline.store import Artifact
from accel.testing import random_model
from tests.conftest import Build, overrides_for
from tests.families import FAMILIES

pytestmark = pytest.mark.xdist_group("chat")
TEMPLATE = (
    "{% for turn in messages %}ask {{ turn['content'] }} {% endfor %}{% if add_generation_prompt %}say{% endif %}"
)
LINES = ["w5 w6 w7", "w90"]
OPTIONS = {"max_new_tokens": 10, "no_repeat_ngram_size": 1, "do_sample": False}


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    """A tiny GPT-2 with a tokenizer that has one word per id and, like GPT-2's, no padding token."""
    folder = shared / "chat"
    with FileLock(shared / "chat.lock"):
        if not (folder / "config.json").exists():
            words = ["<x>", "<s>", "</s>", "ask", "say", *(f"w{number}" for number in range(5, 120))]
            inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<x>"))
            inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<x>")
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
            random_model(FAMILIES["gpt2"]).save_pretrained(folder)
    return folder


def generated_texts(artifacts: dict[str, Artifact]) -> list[str]:
    """Read the outputs that the stage `generate` wrote."""
    outputs: list[str] = json.loads((artifacts["generate"].folder / "texts.json").read_text())["outputs"]
    return outputs


def generate(build: Build, checkpoint: Path, *more: str) -> dict[str, Artifact]:
    """Run `verify` and `generate` on `LINES`, with further overrides."""
    options = [f"+generate.{name}={value}" for name, value in OPTIONS.items()]
    return build(checkpoint, "[verify,generate]", [f"generate.text=[{','.join(LINES)}]", *options, *more])[1]


def continue_with_torch(checkpoint: Path, line: str) -> str:
    """Return PyTorch's continuation of `line`, generated alone and so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    sequences = AutoModelForCausalLM.from_pretrained(checkpoint).eval().generate(ids, **OPTIONS)
    return str(tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_continuations(build: Build, checkpoint: Path) -> None:
    """Texts of different length in one batch get the continuations that they get alone, without the prompt."""
    expected = [continue_with_torch(checkpoint, line) for line in LINES]
    assert generated_texts(generate(build, checkpoint)) == expected
    assert expected[0] != expected[1]
    assert len(set(expected[0].split())) > 8


def test_chat_goes_through_the_template(build: Build, checkpoint: Path) -> None:
    """With `generate.chat=true` each text is a user's turn, and the template adds the start of the answer."""
    expected = [continue_with_torch(checkpoint, f"ask {line} say") for line in LINES]
    found = generated_texts(generate(build, checkpoint, "+generate.chat=true"))
    assert found == expected
    assert found != generated_texts(generate(build, checkpoint))


def test_text_generation_pipeline(build: Build, checkpoint: Path) -> None:
    """`pipeline("text-generation")` gives the same results over accel's model, for batches and chats too."""
    folder = generate(build, checkpoint)["verify"].folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    chat = [{"role": "user", "content": "w7 w8"}]
    results = []
    with load(folder, runtime="cpu") as model:
        for subject in (AutoModelForCausalLM.from_pretrained(checkpoint).eval(), model):
            write = pipeline("text-generation", model=subject, tokenizer=tokenizer)
            results.append([write(LINES, batch_size=2, **OPTIONS), write(chat, **OPTIONS)])
    assert results[0] == results[1]
    assert results[0][0][0][0]["generated_text"].startswith(LINES[0])


def test_second_turn_uses_the_first_turns_caches(build: Build, checkpoint: Path) -> None:
    """Only the new tokens are computed, and the output is that of a generation without the caches."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with load(generate(build, checkpoint)["verify"].folder, runtime="cpu") as model:
        first = model.generate(**tokenizer("ask w5 say", return_tensors="pt"), **OPTIONS, return_dict_in_generate=True)
        text = tokenizer.decode(first.sequences[0]) + " ask w9 w10 say"
        inputs = {
            name: value for name, value in tokenizer(text, return_tensors="pt").items() if name != "token_type_ids"
        }
        without_caches = model.generate(**inputs, **OPTIONS)
        lengths: list[int] = []  # of the ids in each call of decode
        decode = model.runtime.decode

        def recorded_decode(inputs: Any, state: Any) -> Any:
            lengths.append(inputs["input_ids"].shape[1])
            return decode(inputs, state)

        model.runtime.decode = recorded_decode
        found = model.generate(**inputs, **OPTIONS, past_key_values=first.past_key_values)
    assert found.tolist() == without_caches.tolist()
    assert lengths[0] == 5  # the last token of the first answer, and the four of the second question
    assert set(lengths[1:]) == {1}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("generate.audio={file}", ("generate.audio", "generate.text")),
        ("+generate.chat=perhaps", ("generate.chat=perhaps", "bool")),
        ("generate.audio=nowhere.wav", ("nowhere.wav", "no such file")),
    ],
)
def test_inputs_of_another_kind(checkpoint: Path, tmp_path: Path, option: str, named: tuple[str, ...]) -> None:
    """Inputs that the model can't take, such as sound for a text model, are refused before any stage runs."""
    file = tmp_path / "sound.wav"
    file.write_bytes(b"RIFF")
    with pytest.raises(AccelError) as caught:
        execute(compose(overrides_for(checkpoint, tmp_path / "art", "stage=generate", option.format(file=file))))
    assert all(part in str(caught.value) for part in named)
    assert not (tmp_path / "art").exists()


def test_chat_without_a_template(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AccelError, match="chat template"):
        execute(compose(overrides_for(tiny, tmp_path, "stage=generate", "generate.text=w5", "+generate.chat=true")))


@pytest.mark.slow
def test_benchmark_and_profile(build: Build, checkpoint: Path) -> None:
    """Every backend of the CPU generates, session memory is measured, and the profile names the decoder's operators."""
    small = ["benchmark.new_tokens=4", "benchmark.source_length=5", "benchmark.repeats=1", "profile.new_tokens=3"]
    artifacts = build(checkpoint, "[benchmark,profile]", small)[1]
    summary = artifacts["benchmark"].summary
    assert set(summary["backends"]) == {
        "torch_no_cache",
        "torch_cache",
        "onnx_no_cache",
        "onnx_merged",
        "onnx_two_files",
    }
    assert summary["memory"]["onnx_merged"]["session"] > 0
    assert artifacts["profile"].summary["operators"]["MatMul"]["calls"] > 0
