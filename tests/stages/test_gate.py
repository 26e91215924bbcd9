"""Limits of `verify` on differing sequences and lost metrics, and its message when one is exceeded."""

import re
from pathlib import Path

import pytest

from accel.config.schema import Config, ModelConfig, PrecisionConfig, VerifyConfig
from accel.errors import AccelError, VerificationError
from accel.evaluation.metrics import METRICS, MetricLoss
from accel.runtime import layout
from accel.stages import verify
from accel.stages.near_ties import GATED
from tests.conftest import Build

ALL = dict.fromkeys(("greedy", "beams", "padded", "sampling"), 1.0)


def config(dtype: str, **changes: object) -> Config:
    """Return a configuration with `changes` to `verify`, and `weights` of the model."""
    weights = str(changes.pop("weights", "pretrained"))
    return Config(
        model=ModelConfig(name="m", weights=weights),
        precision=PrecisionConfig(name="p", dtype=dtype),
        verify=VerifyConfig(**changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("dtype", "changes", "identical", "passes"),
    [
        ("float32", {}, {"beams": 0.99}, False),
        ("float32", {"min_token_agreement": 0.9}, {"beams": 0.99}, True),
        ("float16", {}, {"beams": 0.5}, True),
        ("float16", {}, {"beams": 0.49}, False),
        ("float16", {"weights": "random"}, {"beams": 0.0}, True),
        ("bfloat16", {"min_token_agreement": 0.95}, {"greedy": 0.94}, False),
        ("bfloat16", {"min_token_agreement": 0.95}, {"sampling": 0.0}, True),  # sampling draws another token at once
    ],
)
def test_min_token_agreement(dtype: str, changes: dict[str, object], identical: dict[str, float], passes: bool) -> None:
    verification = verify.VerificationResult(identical=ALL | identical)
    verify.judge(config(dtype, **changes), verification)
    assert (not verification.failures) == passes
    if not passes:
        (name, share) = next(iter(identical.items()))
        assert f"{name} {share:.1%}" in verification.failures[0]


@pytest.mark.parametrize(("near_ties", "passes"), [(0, False), (1, False), (2, True), (6, True)])
def test_near_ties_agree(near_ties: int, passes: bool) -> None:
    """With weights in low bits; what fails names the sequences that differ otherwise."""
    differing = [
        {"key": f"padded.{number}", "case": "padded", "input": f"text {number}", "position": 3} for number in range(6)
    ]
    verification = verify.VerificationResult(
        identical=ALL | {"padded": 0.25},
        sequences=dict.fromkeys(ALL, 8),
        near_tie=0.02,
        near_ties={"greedy": 0, "beams": 0, "padded": near_ties},
        needed_divergence={f"padded.{number}": 0.01 if number < near_ties else 0.021 for number in range(6)},
        differing=differing,
    )
    verify.judge(config("float32", min_token_agreement=0.5), verification)
    assert (not verification.failures) == passes
    if not passes:
        assert "identical to PyTorch's or different at a near tie: greedy 100.0%" in verification.failures[0]
        assert f"padded {0.25 + near_ties / 8:.1%}" in verification.failures[0]
        assert [failure.split("'")[1] for failure in verification.failures[1:]] == [
            f"text {number}" for number in range(near_ties, near_ties + 3)
        ]


@pytest.mark.parametrize(
    ("metric", "theirs", "ours", "passes"),
    [
        ("exact_match", 76.0, 74.9, False),
        ("exact_match", 76.0, 75.1, True),
        ("word_error_rate", 6.0, 7.1, False),
        ("word_error_rate", 6.0, 1.0, True),  # better is no loss
    ],
)
@pytest.mark.parametrize("standard_error", [0.01, 3.0, None])
def test_max_metric_loss(metric: str, theirs: float, ours: float, passes: bool, standard_error: float | None) -> None:
    """The measured loss decides; where the references are too few to be sure, the message says so."""
    loss = MetricLoss(METRICS[metric].loss(ours, theirs), standard_error)
    verification = verify.VerificationResult(
        identical=ALL,
        metrics={"pytorch": {metric: theirs}, "ours": {metric: ours}},
        metric_losses={metric: loss},
        references=200,
    )
    verify.judge(config("float16"), verification)
    assert (not verification.failures) == passes
    if not passes:
        (failure,) = verification.failures
        assert (
            f"{metric} of 200 references is {ours:.2f}%, PyTorch's {theirs:.2f}%: worse by 1.10 percentage" in failure
        )
        unsure = "200 are too few to be sure" in failure
        assert unsure is (standard_error != 0.01)


def test_failure_names_inputs_and_remedies(build: Build, tiny: Path, artifacts: Path) -> None:
    """The bundle is kept, no deployable is made, and the error carries the verification result."""
    overrides = ["precision=fp16", "verify.inputs=6"]
    _, results = build(tiny, "[merge,verify]", [*overrides, "verify.min_token_agreement=0"])
    identical = results["verify"].summary["identical"]
    assert min(identical[name] for name in GATED) < 1  # with random weights near ties are common
    before = set((artifacts / tiny.name).glob("verify-*/manifest.json"))
    with pytest.raises(VerificationError) as caught:
        build(tiny, "verify", [*overrides, "verify.min_token_agreement=1"])
    message = str(caught.value)
    assert "requires at least 100.0%" in message
    assert "'input " in message
    assert "precision=bf16" in message
    assert "audit.overflow_margin" in message
    assert len(message.splitlines()) <= 12  # all of it is shown
    assert caught.value.summary["identical"] == identical
    assert caught.value.summary["passed"] is False
    assert set((artifacts / tiny.name).glob("verify-*/manifest.json")) == before
    assert layout.is_deployable(results["merge"].folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verify.metrics=[blue]", "unknown metric: 'blue'"),
        ("verify.min_token_agreement=2", "verify.min_token_agreement=2.0: must be from 0 to 1"),
        ("verify.max_metric_loss=-1", "verify.max_metric_loss=-1.0: must be from 0 to 100"),
        ("verify.targets=x.txt", "verify.targets=x.txt needs verify.texts"),
        ("audit.random=false", "audit.random=false needs audit.texts"),
        ("audit.max_batches=4", "audit.max_batches=4: must be audit.batches=8 or more"),
        ("audit.trials=-1", "audit.trials=-1: must be from 0"),
        (
            "precision.plan=mine",
            "unknown precision.plan: 'mine'. Did you mean minimized? Choices: blanket, minimized, operators, rules",
        ),
        ("precision.dtype=float8", "unknown precision.dtype: 'float8'"),
        ("precision=bf16", "CPUExecutionProvider has no kernels for bfloat16, which generate would run"),
    ],
)
def test_invalid_values(build: Build, tiny: Path, override: str, message: str) -> None:
    with pytest.raises(AccelError, match=re.escape(message)):
        build(tiny, "generate", [override])


def test_texts_and_targets_go_together(build: Build, tiny: Path, tmp_path: Path) -> None:
    """Different numbers of texts and targets, or a missing tokenizer, are reported before anything runs."""
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    (tmp_path / "out.txt").write_text("W AH1 N\n")
    overrides = [f"verify.texts={tmp_path / 'in.txt'}", f"verify.targets={tmp_path / 'out.txt'}"]
    with pytest.raises(AccelError, match=r"verify.texts=.*in.txt holds 2 texts and verify.targets=.*out.txt 1"):
        build(tiny, "verify", overrides)
    with pytest.raises(AccelError, match="the checkpoint has no tokenizer"):
        build(tiny, "verify", overrides[:1])
