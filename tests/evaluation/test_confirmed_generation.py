"""Generated ids that logits in float64 confirm are not generated again, and others are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from accel.adapters import registry
from accel.data import texts
from accel.evaluation.component_runner import signatures, torch_run
from accel.evaluation.reference_data import FIRST, LAST, NEW, PATHS, STAGGER, continuation
from accel.evaluation.rounding import Evaluator
from accel.stages import reference
from accel.testing import random_model
from tests.families import FAMILIES

ARCHITECTURES = Path(__file__).parents[2] / "conf" / "architecture"
OPTIONS = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}
INPUTS = 5  # more than `PATHS`

Decode = Callable[[list[list[int]]], list[list[int]]]


@pytest.fixture(params=["llama", "t5"], scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model with random weights."""
    return random_model(FAMILIES[request.param])


@pytest.fixture
def inputs(model: PreTrainedModel) -> list[Mapping[str, Tensor]]:
    """Inputs of different lengths."""
    return [texts.unpadded([40 + number, *range(20, 23 + 2 * number), 7]) for number in range(INPUTS)]


@pytest.fixture
def alone(model: PreTrainedModel, inputs: list[Mapping[str, Tensor]]) -> list[list[int]]:
    """What the model generates for each input by itself."""
    generated = [reference.generate_ids(model, [one], OPTIONS)[0] for one in inputs]
    assert all(len(set(ids[-8:])) == 8 for ids in generated)
    assert len({tuple(ids) for ids in generated}) == INPUTS
    return generated


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the input of each real call of `generate`."""
    lengths: list[int] = []
    real = reference.generate_ids

    def generate_ids(model: Any, single: Any, options: Any) -> list[list[int]]:
        if "forward" not in vars(model):
            lengths.append(single[0]["input_ids"].shape[1])
        return real(model, single, options)

    monkeypatch.setattr(reference, "generate_ids", generate_ids)
    return lengths


def decode(
    model: PreTrainedModel, inputs: list[Mapping[str, Tensor]], padded: list[list[int]], out: Path
) -> list[list[int]]:
    """Decode by `decode_alone`, given the ids of a padded batch."""
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / f"{model.config.model_type}.yaml"))
    evaluate = Evaluator(model, signatures(adapter, model.config), torch_run(adapter, model), torch.float64)
    return reference.decode_alone(model, evaluate, OPTIONS, inputs, padded, out)


def test_confirmed_ids_are_not_generated_again(
    model: PreTrainedModel,
    inputs: list[Mapping[str, Tensor]],
    alone: list[list[int]],
    asked: list[int],
    tmp_path: Path,
) -> None:
    """Only inputs without logits are generated; the logits written are the model's."""
    assert decode(model, inputs, alone, tmp_path) == alone
    assert asked == [inputs[-1]["input_ids"].shape[1]]
    assert len(list(tmp_path.iterdir())) == PATHS
    path = load_file(tmp_path / "path-1.safetensors")
    assert path["ids"].tolist() == alone[1:2]
    decoder_ids = {"decoder_input_ids": path["ids"]} if model.config.is_encoder_decoder else {"input_ids": path["ids"]}
    with torch.no_grad():
        known = inputs[1] if model.config.is_encoder_decoder else {}
        expected = model(**known, **decoder_ids).logits
    torch.testing.assert_close(path["logits"].float(), expected, rtol=1e-4, atol=1e-4)
    assert path["logits"].dtype is torch.float64
    assert "forward" not in vars(model)


@pytest.mark.parametrize("change", ["other token", "too short", "too long"])
def test_other_ids_are_generated_alone(
    model: PreTrainedModel,
    inputs: list[Mapping[str, Tensor]],
    alone: list[list[int]],
    asked: list[int],
    tmp_path: Path,
    change: str,
) -> None:
    """Where a padded batch changes what the model generates, the input by itself counts, and so do its logits."""
    padded = [list(ids) for ids in alone]
    if change == "other token":
        padded[2][-3] = 19
    elif change == "too short":
        padded[2] = padded[2][:-2]
    else:
        padded[2].append(19)
    assert decode(model, inputs, padded, tmp_path) == alone
    assert asked == [inputs[number]["input_ids"].shape[1] for number in (2, INPUTS - 1)]
    assert load_file(tmp_path / "path-2.safetensors")["ids"].tolist() == alone[2:3]


def test_replayed_parts_begin_and_end_as_generations(model: PreTrainedModel) -> None:
    """The first and the last tokens of long generations; a row is padded unless an encoder is before the decoder."""
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / f"{model.config.model_type}.yaml"))
    generated = [list(range(1, 61)), list(range(101, 151))]
    single_inputs = [texts.unpadded([5, 6, 7]), texts.unpadded([8, 9])]
    replay = continuation(adapter, model.config, single_inputs, generated)
    (_, prefill), (_, decoded) = [item for item in replay.items() if str(item[0]) != "encoder"]
    ids = torch.cat([prefill["input_ids"], decoded["input_ids"]], dim=1)  # [2, FIRST + LAST]
    assert decoded["input_ids"].shape == (2, NEW)
    ends = (60, 50) if not model.config.is_encoder_decoder else (50, 50)  # the shortest counts
    assert ids[0].tolist() == [*range(1, FIRST + 1), *range(ends[0] - LAST + 1, ends[0] + 1)]
    padding = 0 if model.config.is_encoder_decoder else STAGGER
    last = range(101 + ends[1] - LAST + padding, 101 + ends[1])
    assert ids[1, padding:].tolist() == [*range(101, 101 + FIRST), *last]
    if padding:
        assert prefill["attention_mask"][1].tolist() == [0] * padding + [1] * (FIRST + LAST - NEW - padding)
