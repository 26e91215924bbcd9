"""Optimum and Transformers.js load a deployable's folder, its tokenizer included, and generate PyTorch's tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import accel
from accel.models.model_class import model_class
from accel.reporting import delivery
from accel.runtime.layout import first_variant
from accel.testing.subject import random_model
from tests.clients.conftest import Client
from tests.conftest import Build
from tests.families import FAMILIES

pytestmark = pytest.mark.clients

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 120))]
UNIQUE = {"max_new_tokens": 8, "no_repeat_ngram_size": 1}  # random weights repeat one token
FEW = ["verify.inputs=2", "verify.max_new_tokens=8"]
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


def save_checkpoint(shared: Path, family: str) -> Path:
    """Save a tiny model of random weights with its tokenizer, once for all processes."""
    checkpoint = shared / "clients" / family
    with FileLock(shared / f"clients-{family}.lock"):
        if not (checkpoint / "tokenizer.json").is_file():
            model = random_model(FAMILIES[family])
            model.save_pretrained(checkpoint)
            save_tokenizer(checkpoint, "right" if model.config.is_encoder_decoder else "left")
    return checkpoint


@pytest.fixture(scope="module", params=["t5", "bart", "whisper", "gpt2", "llama"])
def case(request: pytest.FixtureRequest, shared: Path, build: Build) -> Case:
    family = request.param
    checkpoint = save_checkpoint(shared, family)
    folder = build(checkpoint, "verify", FEW)[1]["verify"].folder
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


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_variants(family: str, shared: Path, build: Build, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """FP32 and FP16 side by side: each client opens the one that it is asked for, by the names that it knows.

    Optimum opens no merged decoder by name, so an encoder-decoder in FP16 needs a folder without FP32 there.
    """
    checkpoint = save_checkpoint(shared, family)
    both, fp16 = tmp_path / "both", tmp_path / "fp16"
    for precision in ("fp32", "fp16"):
        overrides = [*FEW, f"precision={precision}", "verify.min_token_agreement=0"]
        if precision == "fp16":  # with the weights as a deployable for a GPU has them
            overrides += ["convert.transpose_weights=true", "merge.strategy=three_branch"]
        deployable = build(checkpoint, "verify", overrides)[1]["verify"].folder
        delivery.deliver(deployable, both)
    delivery.deliver(deployable, fp16)
    cases = {"padded": {"texts": [LONG, SHORT], "options": UNIQUE}}
    inputs = AutoTokenizer.from_pretrained(checkpoint)([LONG, SHORT], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    optimum, transformers_js = (request.getfixturevalue(name) for name in ("optimum", "transformers_js"))
    for dtype, suffix in (("float32", ""), ("float16", "_fp16")):
        with accel.load(both, "cpu", dtype=dtype) as model:
            expected = model.generate(**inputs, **UNIQUE).tolist()
        if family == "llama":
            found = optimum(both, cases, json.dumps({"file_name": f"model{suffix}.onnx"}))
        else:
            found = optimum(fp16 if suffix else both, cases)
        assert found["padded"]["tokens"] == expected
        js_dtype = suffix.removeprefix("_") or "fp32"
        assert transformers_js(both, cases, js_dtype)["padded"]["tokens"] == expected


def test_graphs_are_the_clients(case: Case) -> None:
    """Clients find the graphs by name, below the folder that holds the config."""
    files = first_variant(case.folder)
    assert (case.folder / "config.json").is_file()
    assert (case.folder / "tokenizer.json").is_file()
    assert files.decoder.relative_to(case.folder).parts[0] == "onnx"
