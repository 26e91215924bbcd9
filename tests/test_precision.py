"""A model that FP16 breaks: blind FP16 is refused, the audited mix says the FP32 words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from accel.errors import AccelError
from accel.graph import files
from accel.graph.plan import Plan
from accel.loading import verdict_of
from accel.stages import audit
from accel.stages.checkpoint import BUILT_IN
from tests.conftest import Build

EMBEDDED = BUILT_IN / "t5-g2p"
FP16 = ("precision=fp16",)
WORDS = (*FP16, "model.references=heldout.tsv", "verify.references=50", "verify.unique_tokens=false")


def scaled_t5(factor: float) -> T5ForConditionalGeneration:
    """The embedded T5 with a residual stream `factor` times as large. RMS norm undoes it: FP32 outputs are the same.

    The head is untied first, so that the logits stay as they are. A trained model, because its tokens are not ties
    that rounding decides.
    """
    model = T5ForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    with torch.no_grad():
        model.shared.weight *= factor
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter *= factor
    return model


@pytest.fixture(scope="session", params=[3e3, 1e6])
def breaking(request: pytest.FixtureRequest, shared: Path) -> Path:
    """The checkpoint of a T5 whose residual stream (3e3), or whose weights too (1e6), FP16 can't hold."""
    folder = shared / f"scaled-{request.param:.0e}"
    scaled_t5(request.param).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "heldout.tsv"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


def test_scaling_changes_nothing_in_fp32() -> None:
    """The model is a fair test only if FP32 outputs don't depend on the factor."""
    ids = torch.arange(5, 17)[None]
    outputs = [scaled_t5(f)(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for f in (1.0, 3e3, 1e6)]
    assert outputs[0].std() > 0.1
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.xdist_group("breaking")
def test_blind_fp16_is_refused_and_the_audited_mix_passes(
    build: Build, breaking: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The audit finds what overflows; without its plan, the same emulated graph gives other numbers and is refused."""
    _, artifacts = build(breaking, "verify", WORDS)
    verdict = verdict_of(artifacts["verify"].folder)
    assert verdict is not None
    assert verdict["arithmetic"] == "emulated"
    assert len({sample["pytorch"] for sample in verdict["samples"]}) == 8
    assert verdict["identical"] == dict.fromkeys(("greedy", "beams", "sampling", "padded"), 1.0)

    monkeypatch.setattr(audit, "read_plans", lambda folder: {role: Plan() for role in ("encoder", "prefill", "step")})
    with pytest.raises(AccelError, match=r"verify refuses the candidate \(float16, emulated\)"):
        build(breaking, "verify", (*WORDS, f"artifacts={tmp_path}"))


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
