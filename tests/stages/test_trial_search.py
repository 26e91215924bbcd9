"""Which weights trials leave in 4 bits, and whether the others get 8."""

from collections.abc import Mapping

import pytest

from accel.config.schema import AuditConfig, Config, PrecisionConfig
from accel.errors import AccelError
from accel.evaluation.weight_trials import WeightTrialResult
from accel.graph.quantization.formats import WeightFormat, formats
from accel.graph.quantization.plan import WeightChoice, WeightPlan
from accel.stages.weight_audit import FALLBACK, apply_trials

WEIGHTS = [f"w{number}" for number in range(9)]


def search(bits: int, error: Mapping[int, Mapping[str, float]], limit: float = 1.0) -> WeightPlan:
    """Return the plan after trials in which every weight adds to the divergence.

    Args:
        bits: Of the precision.
        error: Bits -> weight -> divergence that it adds; 0.01 for those that aren't named.
        limit: Allowed divergence.
    """
    format = formats(bits)["block-64"]
    plan = WeightPlan(
        {name: WeightChoice(64, 64, format.name, errors={format.name: number}) for number, name in enumerate(WEIGHTS)}
    )

    def trial(chosen: Mapping[str, WeightFormat]) -> WeightTrialResult:
        divergence = sum(error.get(each.bits, {}).get(name, 0.01) for name, each in chosen.items())
        return WeightTrialResult(1000, divergence, 0.0, 1000)

    precision = PrecisionConfig(name=f"int{bits}", weight_bits=bits, max_divergence=limit)
    apply_trials(Config(precision=precision, audit=AuditConfig(trials=32)), plan, trial)
    return plan


def test_all_in_four_bits() -> None:
    """One trial is enough."""
    plan = search(4, {})
    assert {choice.format for choice in plan.weights.values()} == {"int4 block-64"}
    assert [trial["weights"] for trial in plan.trials] == [9]


def test_others_get_eight_bits() -> None:
    """Also where a trial only passes with few of them in 4: each trial of the search has the others in 8."""
    plan = search(4, {4: {"w8": 5.0, "w2": 5.0}})
    wide = {name for name, choice in plan.weights.items() if choice.format == FALLBACK.name}
    assert wide == {"w2", "w8"}
    assert all(plan.weights[name].reason == "trials" for name in wide)
    assert {choice.format for name, choice in plan.weights.items() if name not in wide} == {"int4 block-64"}
    assert {trial["weights"] for trial in plan.trials} == {9}


def test_the_errors_of_eight_bits_count_in_the_search() -> None:
    """What ships was tried as it is: here 4 bits for all but two would pass if those were in FP32, and no more do."""
    eight = {"w7": 0.4, "w8": 0.4}
    plan = search(4, {4: {"w8": 5.0, "w7": 5.0, "w3": 0.3}, 8: eight})
    shipped = sum({4: {"w3": 0.3}, 8: eight}[each.bits].get(name, 0.01) for name, each in plan.formats().items())
    assert shipped <= 1.0
    assert {name for name, choice in plan.weights.items() if choice.format == FALLBACK.name} == {"w3", "w7", "w8"}


def test_fp32_where_eight_bits_fail_as_well() -> None:
    """And in a precision of 8 bits."""
    for bits in (4, 8):
        plan = search(bits, {4: {"w5": 5.0}, 8: {"w5": 5.0}})
        assert {name: choice.format for name, choice in plan.weights.items() if choice.reason} == {"w5": None}


def test_no_plan() -> None:
    """No weight in 4 bits is no plan of that precision."""
    with pytest.raises(AccelError, match="precision=int4: no plan passed"):
        search(4, {4: dict.fromkeys(WEIGHTS, 5.0)})
