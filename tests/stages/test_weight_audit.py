"""Weights of 8 bits: a model whose outliers they can't represent is mended by exceptions, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from accel.config.schema import PrecisionConfig
from accel.errors import VerificationError
from accel.models.checkpoints import BUILT_IN
from accel.models.loading import verification_of
from accel.stages import weight_audit
from accel.stages.torch_error import comparable_dtype
from scripts.peers.checkpoint import save_random_t5
from tests.conftest import Build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("outliers")]

# Feed-forward layers of t5-g2p whose second weight gets outliers.
SCALED = ("encoder.block.2", "decoder.block.1")
INDEX = {"encoder": 1, "decoder": 2}
FACTOR, EVERY = 200, 16
OVERRIDES = (
    "precision=int8",
    "model.references=heldout.tsv",
    "verify.references=40",
    "verify.unique_tokens=false",
    "precision.weight_formats=[block-64]",
)


def weight_name(block: str, name: str) -> str:
    """Name of a feed-forward weight of `block`."""
    return f"{block}.layer.{INDEX[block.split('.')[0]]}.DenseReluDense.{name}.weight"


@pytest.fixture(scope="module")
def outliers(shared: Path) -> Path:
    """t5-g2p with some rows of weights times 200 and their inputs divided by 200: in FP32 it is the same model.

    Between the two weights is a ReLU, which a positive factor passes through.
    """
    folder = shared / "outliers" / "t5-g2p-outliers"
    if not (folder / "model.safetensors").is_file():
        shutil.copytree(BUILT_IN / "t5-g2p", folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        for block in SCALED:
            weights[weight_name(block, "wi")][::EVERY] /= FACTOR  # [out, in]
            weights[weight_name(block, "wo")][:, ::EVERY] *= FACTOR
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_trials_keep_the_weights_with_outliers_in_fp32(
    build: Build, outliers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And few others; the certificate has the trials and the reasons.

    The first limit lets the encoder's outliers pass. Verification refuses that plan, and stricter trials find them.
    """
    with caplog.at_level("INFO", "accel.progress"):
        _, artifacts = build(outliers, "[audit,convert,verify]", OVERRIDES)
    assert "Back to the trials, whose limits are divided by precision.strictness=2" in caplog.text
    plan = weight_audit.read_plan(artifacts["audit"].folder)
    kept = {name: each for name, each in plan.weights.items() if each.format is None}
    names = {weight_name(block, "wo") for block in SCALED}
    assert names <= set(kept)
    assert len(kept) <= 6
    assert not plan.trials[0]["passed"]
    assert f"trial 1: {len(plan.weights)} of {len(plan.weights)} weights in low bits, divergence" in caplog.text
    assert plan.trials[0]["weights"] == len(plan.weights)
    assert any(trial["passed"] and trial["weights"] == len(plan.weights) - len(kept) for trial in plan.trials)
    assert {kept[name].reason for name in names} == {weight_audit.TRIALS}
    ordinary = [plan.error(name) for name in plan.weights if name not in names]
    assert min(plan.error(name) for name in names) > 5 * max(ordinary)
    folder = artifacts["verify"].folder
    verification = verification_of(folder)
    assert verification is not None
    assert (verification["passed"], verification["precision"], verification["execution"]) == (True, "int8", "native")
    assert (verification["dtype"], verification["torch_dtype"]) == ("float32", "bfloat16")
    certificate = json.loads((folder / "certificate_int8.json").read_text())
    assert certificate["plan"]["trials"] == plan.trials
    page = (folder / "certificate_int8.html").read_text()
    assert "PyTorch in bfloat16</th>" in page
    for name in names:
        assert f"<td>{name}</td><td>float32: trials</td>" in page
    shares = [component["weight_bytes"] for component in artifacts["convert"].summary.values()]
    assert all(0.8 < share < 1 for share in shares), shares


def test_without_trials_verification_refuses_it(build: Build, outliers: Path) -> None:
    """The message names the weights."""
    with pytest.raises(VerificationError) as raised:
        build(outliers, "verify", (*OVERRIDES, "audit.trials=0"))
    for block in SCALED:
        assert weight_name(block, "wo") in str(raised.value)
    assert "int8, native" in str(raised.value)


def test_near_ties_of_random_weights_pass(build: Build, shared: Path) -> None:
    """Of a flat distribution over 32,128 ids any rounding changes the likeliest, which says nothing about it."""
    folder = shared / "near_ties" / "random-t5"
    if not (folder / "tokenizer.json").is_file():  # written last
        save_random_t5(folder, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    _, artifacts = build(folder, "audit", ("precision=int4",))
    plan = weight_audit.read_plan(artifacts["audit"].folder)
    assert all(choice.format is not None for choice in plan.weights.values())
    (trial,) = plan.trials
    assert trial["passed"], trial
    assert trial["changed"] > 0.1 * trial["greedy_tokens"], "without near ties this test shows nothing"
    assert (trial["clear_changes"], trial["change_bound"] < 0.1) == (0, True)


def test_own_errors_of_weights_in_16_bits_are_in_the_dtype_of_the_values() -> None:
    """Also beside int8 weights where the values have 16 bits."""
    for dtype, bits, comparable in (
        ("float32", None, "float32"),
        ("float16", None, "float16"),
        ("float32", 4, "bfloat16"),
        ("float16", 8, "float16"),
    ):
        assert comparable_dtype(PrecisionConfig("name", dtype=dtype, weight_bits=bits)) == comparable
