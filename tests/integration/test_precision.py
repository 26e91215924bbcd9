"""A model that FP16 breaks: blind FP16 is refused, the audited mix says the FP32 words."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import T5ForConditionalGeneration

from accel.errors import AccelError, VerificationError
from accel.graph import files
from accel.models.loading import load, verification_of
from accel.stages import audit
from scripts.scaled_t5 import save, scaled_t5
from tests.conftest import Build

FP16 = ("precision=fp16",)
WORDS = (*FP16, "model.references=heldout.tsv", "verify.unique_tokens=false")


def saved(folder: Path, factor: float, layers: int | None = None) -> Path:
    """`folder`, with the checkpoint of a scaled T5 and the words."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "heldout.tsv").is_file():
            save(folder, factor, layers)
    return folder


@pytest.fixture(scope="session", params=[(3e3, None), (1e6, 12)])
def breaking(request: pytest.FixtureRequest, shared: Path) -> Path:
    """The checkpoint of a T5 whose residual stream (3e3), or whose weights too, FP16 can't hold."""
    factor, layers = request.param
    return saved(shared / f"scaled-{factor:.0e}-{layers}", factor, layers)


def test_scaling_changes_nothing_in_fp32() -> None:
    """The model is a fair test only if FP32 outputs don't depend on the factor."""
    ids = torch.arange(5, 17)[None]
    for layers in (None, 12):
        outputs = [scaled_t5(f, layers)(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for f in (1.0, 3e3, 1e6)]
        assert outputs[0].std() > 0.1
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.xdist_group("breaking")
def test_blind_fp16_is_refused_and_the_audited_mix_passes(build: Build, breaking: Path) -> None:
    """The audit finds what overflows; without its plan, the same emulated graph gives other numbers and is refused."""
    _, artifacts = build(breaking, "verify", WORDS)
    verification = verification_of(artifacts["verify"].folder)
    assert verification is not None
    assert verification["execution"] == "emulated"
    assert len({sample["pytorch"] for sample in verification["samples"]}) == 8
    assert verification["identical"] == dict.fromkeys(("greedy", "beams", "sampling", "padded"), 1.0)

    with pytest.raises(VerificationError, match=r"verification of the bundle failed \(float16, emulated\)") as caught:
        build(breaking, "verify", (*WORDS, "precision.plan=blanket"))
    assert caught.value.summary["worst_logits"] is None or caught.value.summary["worst_logits"] > 1


@pytest.mark.xdist_group("breaking")
def test_every_kept_node_has_its_reason(build: Build, breaking: Path) -> None:
    """The plan names the rule, the value and the numbers; an overflow is one only if margin x largest passes 65504."""
    _, artifacts = build(breaking, "audit", FP16)
    plans = json.loads((artifacts["audit"].folder / audit.PLAN).read_text())
    reasons = [reason for plan in plans.values() for reason in plan["nodes"].values()]
    overflows = [reason for reason in reasons if reason["rule"] == "overflow"]
    assert len(overflows) > 20
    assert all(2 * reason["largest"] > 65504 for reason in overflows)


def test_most_of_an_ordinary_model_is_fp16(build: Build, tiny: Path) -> None:
    """Nodes, weight bytes and caches in FP16, every weight still stored once, at the type the plan gives it."""
    _, artifacts = build(tiny, "verify", FP16)
    shares = build(tiny, "convert", FP16)[1]["convert"].summary
    assert min(share["nodes"] for share in shares.values()) > 0.9
    assert min(share["weight_bytes"] for share in shares.values()) > 0.99
    decoder = files.load(artifacts["verify"].folder / "decoder_model_merged.onnx")
    types = {value.name: value.dtype.name for value in decoder.graph.inputs if value.dtype}
    assert types["past_key_values.0.decoder.key"] == types["past_key_values.1.encoder.value"] == "FLOAT16"
    model = T5ForConditionalGeneration.from_pretrained(tiny)
    decoder_parameters = sum(p.numel() for p in {*model.decoder.parameters(), *model.lm_head.parameters()})
    assert files.weight_bytes(decoder) <= 1.01 * 2 * decoder_parameters + 2000


@pytest.mark.xdist_group("breaking")
def test_what_the_rule_keeps_too_carefully_is_dropped(build: Build, shared: Path) -> None:
    """A residual stream of a thousandth: most norms may lose digits, some may not, and words are spelled as in FP32.

    The graph is taken as exported, because a fused norm has nothing to keep. Without trials, all stay.
    """
    folder = saved(shared / "scaled-1e-3-None", 1e-3)
    plain = (*WORDS, "optimize.passes.fuse_norms=false")
    _, made = build(folder, "[audit,verify]", plain)
    sizes = made["audit"].summary["sizes"]
    for component, plan in audit.read_plans(made["audit"].folder).items():
        kept = [reason for reason in plan.nodes.values() if reason.rule == "underflow"]
        assert 0 < len(kept) < len(plan.dropped), component
        assert {reason.rule for reason in plan.dropped.values()} == {"underflow"}
        before, after = sizes["by the rule"][component], sizes["with the fewest casts"][component]
        assert after["fp32_nodes"] <= before["fp32_nodes"] / 2
        assert after["casts"] <= before["casts"] / 2
    metrics = made["verify"].summary["metrics"]
    for name, theirs in metrics["pytorch"].items():
        assert abs(metrics["ours"][name] - theirs) < 0.1
    careful = build(folder, "audit", (*plain, "audit.trials=0"))[1]["audit"].summary["sizes"]
    assert careful["with the fewest casts"] == sizes["by the rule"]


def test_bfloat16_passes_by_emulation(build: Build) -> None:
    """On the CPU, where the graph itself can't run: every value rounded to 8 bits, nothing overflows."""
    given = ("precision=bf16", "model.references=heldout.tsv", "verify.unique_tokens=false")
    _, made = build("accel://t5-g2p", "[convert,verify]", given)
    assert made["verify"].summary["execution"] == "emulated"
    assert min(made["verify"].summary["identical"][name] for name in ("greedy", "beams", "padded")) >= 0.75
    assert 1e-3 < made["verify"].summary["worst_logits"] < 1
    decoder = files.load(made["verify"].folder / "decoder_model_merged.onnx")
    types = {value.dtype.name for value in decoder.graph.inputs if value.dtype}
    assert types == {"INT64", "BOOL", "BFLOAT16"}
    assert min(mix["nodes"] for mix in made["convert"].summary.values()) > 0.9
    with pytest.raises(AccelError, match=r"CPUExecutionProvider can't run this graph: .*Try another precision"):
        load(made["verify"].folder, runtime="cpu")
