"""A model that FP16 breaks: blanket FP16 fails verification, the precision plan gives FP32's tokens."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import T5ForConditionalGeneration

from accel.errors import AccelError, VerificationError
from accel.graph import files
from accel.models.loading import load, verification_of
from accel.runtime.layout import first_variant
from accel.stages import audit
from scripts.scaled_t5 import save, scaled_t5
from tests.conftest import Build

FP16 = ("precision=fp16",)
REFERENCES = (*FP16, "model.references=heldout.tsv", "verify.unique_tokens=false")


def saved(folder: Path, factor: float, layers: int | None = None) -> Path:
    """Write the checkpoint of a scaled T5 and its references into `folder`, and return it."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "heldout.tsv").is_file():
            save(folder, factor, layers)
    return folder


@pytest.fixture(scope="session", params=[(3e3, None), (1e6, 12)])
def breaking(request: pytest.FixtureRequest, shared: Path) -> Path:
    """Checkpoint of a T5 whose residual stream (factor 3e3), or whose weights as well (1e6), exceed FP16's range."""
    factor, layers = request.param
    return saved(shared / f"scaled-{factor:.0e}-{layers}", factor, layers)


def test_scaling_changes_nothing_in_fp32() -> None:
    """FP32 outputs don't depend on the factor, without which the model would be no fair test."""
    ids = torch.arange(5, 17)[None]
    for layers in (None, 12):
        outputs = [scaled_t5(f, layers)(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for f in (1.0, 3e3, 1e6)]
        assert outputs[0].std() > 0.1
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.xdist_group("breaking")
def test_blanket_fp16_fails_and_the_precision_plan_passes(build: Build, breaking: Path) -> None:
    """With the audit's plan verification passes; without it, the outputs of the emulated graph differ and it fails."""
    _, artifacts = build(breaking, "verify", REFERENCES)
    verification = verification_of(artifacts["verify"].folder)
    assert verification is not None
    assert verification["execution"] == "emulated"
    assert len({sample["pytorch"] for sample in verification["samples"]}) == 8
    assert verification["identical"] == dict.fromkeys(("greedy", "beams", "sampling", "padded"), 1.0)

    with pytest.raises(VerificationError, match=r"verification of the bundle failed \(float16, emulated\)") as caught:
        build(breaking, "verify", (*REFERENCES, "precision.plan=blanket"))
    assert caught.value.summary["worst_logits"] is None or caught.value.summary["worst_logits"] > 1


@pytest.mark.slow
@pytest.mark.xdist_group("breaking")
def test_every_kept_node_has_its_reason(build: Build, breaking: Path) -> None:
    """The plan names rule, value and magnitudes; an overflow is one only if margin x largest exceeds 65504."""
    _, artifacts = build(breaking, "audit", FP16)
    plans = json.loads((artifacts["audit"].folder / audit.PLAN).read_text())
    reasons = [reason for plan in plans.values() for reason in plan["nodes"].values()]
    overflows = [reason for reason in reasons if reason["rule"] == "overflow"]
    assert len(overflows) > 20
    assert all(2 * reason["largest"] > 65504 for reason in overflows)


def test_most_of_an_ordinary_model_is_fp16(build: Build, tiny: Path) -> None:
    """Nodes, weight bytes and caches are in FP16, and every weight is still stored once, in its type by the plan."""
    _, artifacts = build(tiny, "verify", FP16)
    shares = build(tiny, "convert", FP16)[1]["convert"].summary
    assert min(share["nodes"] for share in shares.values()) > 0.9
    assert min(share["weight_bytes"] for share in shares.values()) > 0.99
    decoder = files.load(first_variant(artifacts["verify"].folder).decoder)
    types = {value.name: value.dtype.name for value in decoder.graph.inputs if value.dtype}
    assert types["past_key_values.0.decoder.key"] == types["past_key_values.1.encoder.value"] == "FLOAT16"
    model = T5ForConditionalGeneration.from_pretrained(tiny)
    decoder_parameters = sum(p.numel() for p in {*model.decoder.parameters(), *model.lm_head.parameters()})
    assert files.weight_bytes(decoder) <= 1.01 * 2 * decoder_parameters + 2000


@pytest.mark.slow
@pytest.mark.xdist_group("breaking")
def test_trials_drop_nodes_that_the_rules_keep(build: Build, shared: Path) -> None:
    """With a residual stream scaled by 1e-3, most norms may lose digits, some may not, and metrics are FP32's.

    How many of one component depends on how the processor rounds: of 28 nodes of prefill, 16 stayed in FP32 on one
    without AVX512. So most are dropped in all components together, and some in each.

    Norms are not fused here, because a fused norm has no values that the underflow rule would keep. Without trials, all
    nodes stay in FP32.
    """
    folder = saved(shared / "scaled-1e-3-None", 1e-3)
    plain = (*REFERENCES, "optimize.passes.fuse_norms=false")
    _, artifacts = build(folder, "[audit,verify]", plain)
    sizes = artifacts["audit"].summary["sizes"]
    plans = audit.read_plans(artifacts["audit"].folder)
    kept = {
        component: [reason for reason in plan.nodes.values() if reason.rule == "underflow"]
        for component, plan in plans.items()
    }
    for component, plan in plans.items():
        assert kept[component], component
        assert plan.dropped, component
        assert {reason.rule for reason in plan.dropped.values()} == {"underflow"}
    assert sum(map(len, kept.values())) < sum(len(plan.dropped) for plan in plans.values())
    for size in ("fp32_nodes", "casts"):
        before, after = (
            sum(each[size] for each in sizes[when].values()) for when in ("by the rule", "with the fewest casts")
        )
        assert after <= before / 2, size
    metrics = artifacts["verify"].summary["metrics"]
    for name, theirs in metrics["pytorch"].items():
        assert abs(metrics["ours"][name] - theirs) < 0.1
    without_trials = build(folder, "audit", (*plain, "audit.trials=0"))[1]["audit"].summary["sizes"]
    assert without_trials["with the fewest casts"] == sizes["by the rule"]


@pytest.mark.slow
def test_bfloat16_passes_by_emulation(build: Build) -> None:
    """On the CPU, which can't run the graph itself, the emulation with 8 significant bits passes."""
    overrides = ("precision=bf16", "model.references=heldout.tsv", "verify.unique_tokens=false")
    _, artifacts = build("accel://t5-g2p", "[convert,verify]", overrides)
    assert artifacts["verify"].summary["execution"] == "emulated"
    assert min(artifacts["verify"].summary["identical"][name] for name in ("greedy", "beams", "padded")) >= 0.75
    assert 1e-3 < artifacts["verify"].summary["worst_logits"] < 1
    decoder = files.load(first_variant(artifacts["verify"].folder).decoder)
    types = {value.dtype.name for value in decoder.graph.inputs if value.dtype}
    assert types == {"INT64", "BOOL", "BFLOAT16"}
    assert min(mix["nodes"] for mix in artifacts["convert"].summary.values()) > 0.9
    with pytest.raises(AccelError, match=r"CPUExecutionProvider can't run this graph: .*Try another precision"):
        load(artifacts["verify"].folder, runtime="cpu")
