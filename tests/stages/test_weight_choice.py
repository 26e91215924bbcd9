"""Which formats a weight may have, by what reads it and where."""

from types import SimpleNamespace
from typing import Any

import pytest

from accel.config.schema import Config, ModelConfig, PrecisionConfig, RuntimeConfig
from accel.evaluation import product_cost
from accel.stages import weight_audit
from accel.stages.weight_audit import LOOKED_UP, LOOKED_UP_REASON


@pytest.mark.parametrize(
    ("device", "bits", "table", "reason"),
    [
        ("cuda", 4, LOOKED_UP.name, LOOKED_UP_REASON),
        ("cuda", 8, "int8 block-64", ""),
        ("cpu", 4, "int4 block-64", ""),
    ],
)
def test_a_table_that_is_looked_up_on_cuda_has_8_bits(
    device: str, bits: int, table: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_cost, "relative_errors", lambda weight, rows, names, **_: dict.fromkeys(names, 0.01))
    monkeypatch.setattr(product_cost, "times", lambda *_: {"int4 block-64": 1.0, "int8 block-64": 1.0})
    monkeypatch.setattr(weight_audit, "matrix", lambda weight: None)
    config = Config(
        model=ModelConfig(),
        precision=PrecisionConfig(weight_bits=bits, weight_formats=["block-64"]),
        runtime=RuntimeConfig(device=device),
    )
    weights: Any = {
        "table": SimpleNamespace(shape=(64, 120), obstacle="", lookups=["a Gather"]),
        "other": SimpleNamespace(shape=(64, 64), obstacle="", lookups=[]),
    }
    inputs: Any = SimpleNamespace(rows=dict.fromkeys(weights))
    plan = weight_audit.choose_formats(config, weights, inputs, SimpleNamespace())  # type: ignore[arg-type]
    assert (plan.weights["table"].format, plan.weights["table"].reason) == (table, reason)
    assert (plan.weights["other"].format, plan.weights["other"].reason) == (f"int{bits} block-64", "")
