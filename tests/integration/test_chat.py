"""Decoder-only models at the prompt: continuations, chat templates, and transformers' pipeline over our model."""

import json
from pathlib import Path

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
    """A tiny GPT-2 and a tokenizer of one word an id, without a padding token, as GPT-2's is."""
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


def said(made: dict[str, Artifact]) -> list[str]:
    written: list[str] = json.loads((made["generate"].folder / "texts.json").read_text())["outputs"]
    return written


def generate(build: Build, checkpoint: Path, *more: str) -> dict[str, Artifact]:
    options = [f"+generate.{name}={value}" for name, value in OPTIONS.items()]
    return build(checkpoint, "[verify,generate]", [f"generate.text=[{','.join(LINES)}]", *options, *more])[1]


def by_pytorch(checkpoint: Path, line: str) -> str:
    """What PyTorch adds to `line`, alone and so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(checkpoint).eval().generate(ids, **OPTIONS)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_what_follows_the_prompt(build: Build, checkpoint: Path) -> None:
    """Texts of different length in one batch, each continued as it is alone; the prompt itself is left out."""
    expected = [by_pytorch(checkpoint, line) for line in LINES]
    assert said(generate(build, checkpoint)) == expected
    assert expected[0] != expected[1]
    assert len(set(expected[0].split())) > 8


def test_chat_goes_through_the_template(build: Build, checkpoint: Path) -> None:
    """`generate.chat=true`: each text is a user's turn, and the template says where the answer begins."""
    expected = [by_pytorch(checkpoint, f"ask {line} say") for line in LINES]
    found = said(generate(build, checkpoint, "+generate.chat=true"))
    assert found == expected
    assert found != said(generate(build, checkpoint))


def test_text_generation_pipeline(build: Build, checkpoint: Path) -> None:
    """`pipeline("text-generation")` takes our model in place of PyTorch's, batches and chats included."""
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


def test_a_second_turn_uses_the_first_ones_caches(build: Build, checkpoint: Path) -> None:
    """Only what is new is computed: the step sees the new tokens, and the words are those of a fresh start."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with load(generate(build, checkpoint)["verify"].folder, runtime="cpu") as model:
        first = model.generate(**tokenizer("ask w5 say", return_tensors="pt"), **OPTIONS, return_dict_in_generate=True)
        text = tokenizer.decode(first.sequences[0]) + " ask w9 w10 say"
        again = {
            name: value for name, value in tokenizer(text, return_tensors="pt").items() if name != "token_type_ids"
        }
        fresh = model.generate(**again, **OPTIONS)
        seen: list[int] = []
        decode = model.runtime.decode
        model.runtime.decode = lambda inputs, state: (seen.append(inputs["input_ids"].shape[1]), decode(inputs, state))[
            1
        ]
        found = model.generate(**again, **OPTIONS, past_key_values=first.past_key_values)
    assert found.tolist() == fresh.tolist()
    assert seen[0] == 5  # the last token of the first answer, and the four of the second question
    assert set(seen[1:]) == {1}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("generate.audio={file}", ("generate.audio", "generate.text")),
        ("+generate.chat=perhaps", ("generate.chat", "true or false")),
        ("generate.audio=nowhere.wav", ("nowhere.wav", "no such file")),
    ],
)
def test_inputs_of_another_kind(checkpoint: Path, tmp_path: Path, option: str, named: tuple[str, ...]) -> None:
    """Sound for a model that reads is refused before any stage runs."""
    file = tmp_path / "sound.wav"
    file.write_bytes(b"RIFF")
    with pytest.raises(AccelError) as caught:
        execute(compose(overrides_for(checkpoint, tmp_path / "art", "stage=generate", option.format(file=file))))
    assert all(part in str(caught.value) for part in named)
    assert not (tmp_path / "art").exists()


def test_chat_without_a_template(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AccelError, match="chat template"):
        execute(compose(overrides_for(tiny, tmp_path, "stage=generate", "generate.text=w5", "+generate.chat=true")))


def test_benchmark_and_profile(build: Build, checkpoint: Path) -> None:
    """Every setup of the CPU generates, sessions are weighed, and the profile names the decoder's operators."""
    small = ["benchmark.new_tokens=4", "benchmark.source_length=5", "benchmark.repeats=1", "profile.new_tokens=3"]
    made = build(checkpoint, "[benchmark,profile]", small)[1]
    found = made["benchmark"].summary
    assert set(found["backends"]) == {"torch_no_cache", "torch_cache", "onnx_no_cache", "onnx_merged", "onnx_two_files"}
    assert found["memory"]["onnx_merged"]["session"] > 0
    assert made["profile"].summary["operators"]["MatMul"]["calls"] > 0
