"""Prompts by the plan of a decode step, for every decoder-only family: logits and caches against ONNX Runtime's."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.engine.planning.trace import NoMatchError
from accel.engine.prefill.planned_prefill import PlannedPrefill
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.dynamic_cache import DynamicCacheRuntime, open_dynamic
from accel.runtime.session import SessionSettings
from tests.engine.planning.test_families import plan_of
from tests.engine.test_families import CPU, Make, families, make
from tests.families import FAMILIES

__all__ = ["make"]  # the fixture
BATCH, PADS, VOCABULARY = 3, 2, 120  # rows; tokens before the second one
LENGTHS = (1, 7, 21, 70)  # the last one is beyond the original length of phi3-longrope
REFUSED = {  # family -> why its prompts are left to ONNX Runtime
    "bloom": "has no axis of rows",
    "gemma2": "caps its scores",
    "mixtral": "run in torch",
}
LONGEST = {"mistral": 8, "gemma3_text": 8, "falcon-alibi": 0}  # tokens, for a window; ALiBi is a bias at all distances
DECODERS = sorted(name for name, config in FAMILIES.items() if "num_hidden_layers" in config or "n_layer" in config)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, divided by the largest magnitude."""
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def prompts(length: int, padded: bool, keep: int) -> dict[str, Tensor]:
    """Return the inputs for random prompts, the second of which begins with padding where `padded`."""
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :PADS] = 0
    return decoder_inputs(ids, mask, keep)


def check(planned: PlannedPrefill, runtime: DynamicCacheRuntime, inputs: Mapping[str, Tensor], limit: float) -> None:
    """Compare logits and caches, of all tokens but padding, with those of ONNX Runtime."""
    computed = planned(inputs)
    assert computed is not None
    logits, caches = computed
    expected, state = runtime.prefill(dict(inputs))
    visible = inputs["attention_mask"] != 0
    assert difference(logits[visible[:, -logits.shape[1] :]], expected[visible[:, -logits.shape[1] :]]) < limit
    assert set(caches) == set(state.views())
    for name, cache in state.views().items():
        mine, theirs = (each.transpose(1, 2)[visible] for each in (caches[name], cache))  # [tokens, heads, size]
        assert difference(mine, theirs) < limit


@families(*DECODERS)
def test_prompts(make: Make, request: pytest.FixtureRequest) -> None:
    """Lengths other than the export example's, with and without padding, all logits or the last ones."""
    family = request.node.callspec.params["make"]
    files = make("precision=fp32")
    plan = plan_of(files.static_decode)
    if family in REFUSED:
        with pytest.raises(NoMatchError, match=REFUSED[family]):
            PlannedPrefill(plan, CPU, 0)
        return
    runtime, planned = open_dynamic(files, SessionSettings()), PlannedPrefill(plan, CPU, 0)
    for length in LENGTHS:
        for padded, keep in ((False, 0), (False, 1), (True, 0), (True, 3))[: 2 if length <= PADS else 4]:
            inputs = prompts(length, padded, keep)
            if length > LONGEST.get(family, length):
                assert planned(inputs) is None
            else:
                check(planned, runtime, inputs, 1e-5)


@families("gpt2")
def test_short_prompts_and_narrow_integers(make: Make) -> None:
    """Prompts of few tokens are left to ONNX Runtime, but for padded ones; inputs of other types are cast."""
    planned = PlannedPrefill(plan_of(make("precision=fp32").static_decode), CPU, 60)
    taken = {
        (length, padded): planned(prompts(length, padded, 1)) for length in (9, 11, 19, 21) for padded in (False, True)
    }
    assert [case for case, found in taken.items() if found is not None] == [
        (11, True),
        (19, True),
        (21, False),
        (21, True),
    ]
    inputs = prompts(21, True, 1)
    narrow = {name: value if value.ndim == 0 else value.int() for name, value in inputs.items()}
    wide, narrow_result = taken[21, True], planned(narrow)
    assert wide is not None
    assert narrow_result is not None
    assert torch.equal(wide[0], narrow_result[0])


@families("gpt2", "mistral")
def test_generation(make: Make) -> None:
    """A runtime goes on from prompts by the plan as from ONNX Runtime's, and where they can't be computed so."""
    files = make("precision=fp32")
    planned = PlannedPrefill(plan_of(files.static_decode), CPU, 0)
    computed = []

    def count(inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]] | None:
        result = planned(inputs)
        computed.append(result is not None)
        return result

    with accel.load(files.folder, "cpu", check=False, static=True) as model:
        for length in (6, 21):
            given = {name: prompts(length, True, 0)[name] for name in ("input_ids", "attention_mask")}
            options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
            model.runtime.dynamic.planned_prefill = None
            expected = [model.generate(**given, **options, num_beams=beams) for beams in (1, 3)]
            model.runtime.dynamic.planned_prefill = count
            found = [model.generate(**given, **options, num_beams=beams) for beams in (1, 3)]
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs)
        family = model.config.model_type
    assert computed == [True, True, family == "gpt2", family == "gpt2"]
