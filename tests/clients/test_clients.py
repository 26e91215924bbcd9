"""Optimum and Transformers.js load a deployable's folder, its tokenizer included, and generate PyTorch's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel.models.model_class import model_class
from accel.runtime.layout import first_variant
from accel.testing.subject import random_model
from tests.clients.conftest import Client
from tests.conftest import Build
from tests.families import FAMILIES

pytestmark = pytest.mark.clients

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 120))]
UNIQUE = {"max_new_tokens": 8, "no_repeat_ngram_size": 1}  # random weights repeat one token
LONG, SHORT = "w5 w9 w40 w17 w8", "w7 w33"


@dataclass(frozen=True)
class Case:
    """A deployable and, for each way of generating, what PyTorch generates."""

    folder: Path
    cases: Mapping[str, Any]
    expected: Mapping[str, Any]


def save_tokenizer(folder: Path, padding_side: str) -> None:
    """Save a tokenizer of one id per word, as transformers saves it."""
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["t5", "bart", "whisper", "gpt2", "llama"])
def case(request: pytest.FixtureRequest, shared: Path, build: Build) -> Case:
    family = request.param
    checkpoint = shared / "clients" / family
    with FileLock(shared / f"clients-{family}.lock"):
        if not (checkpoint / "tokenizer.json").is_file():
            model = random_model(FAMILIES[family])
            model.save_pretrained(checkpoint)
            save_tokenizer(checkpoint, "right" if model.config.is_encoder_decoder else "left")
        folder = build(checkpoint, "verify", ["verify.inputs=2", "verify.max_new_tokens=8"])[1]["verify"].folder
    eager = random_model(FAMILIES[family])
    eager = model_class(eager.config).from_pretrained(checkpoint).eval()
    cases: dict[str, Any] = {
        "greedy": {"texts": [LONG], "options": UNIQUE},
        "beams": {"texts": [LONG], "options": UNIQUE | {"num_beams": 3}},
        "padded": {"texts": [LONG, SHORT], "options": UNIQUE},
    }
    if family == "whisper":
        features = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
        for name, each in cases.items():
            del each["texts"]
            each["features"] = features[: 2 if name == "padded" else 1].tolist()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = {}
    for name, each in cases.items():
        if "features" in each:
            inputs = {"input_features": torch.tensor(each["features"])}
        else:
            inputs = dict(tokenizer(each["texts"], padding=True, return_tensors="pt", return_token_type_ids=False))
        tokens = eager.generate(**inputs, **each["options"]).tolist()
        expected[name] = {"inputs": inputs["input_ids"].tolist() if "texts" in each else None, "tokens": tokens}
    return Case(folder, cases, expected)


def test_optimum(case: Case, optimum: Client) -> None:
    """Greedy search, beams and a batch."""
    assert optimum(case.folder, case.cases) == case.expected


def test_transformers_js(case: Case, transformers_js: Client) -> None:
    """Greedy search and a batch; Transformers.js has no beam search."""
    cases = {name: each for name, each in case.cases.items() if name != "beams"}
    found = transformers_js(case.folder, cases, "fp32")
    assert found == {name: case.expected[name] for name in cases}


def test_graphs_are_the_clients(case: Case) -> None:
    """Clients find the graphs by name, below the folder that holds the config."""
    files = first_variant(case.folder)
    assert (case.folder / "config.json").is_file()
    assert (case.folder / "tokenizer.json").is_file()
    assert files.decoder.relative_to(case.folder).parts[0] == "onnx"
