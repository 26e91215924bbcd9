"""Families with weights of 8 and 4 bits: verified, every product in low bits, every weight once, rows independent."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from accel.cli.compose import compose, execute
from accel.models.generation import AcceleratedModel
from accel.models.loading import load, verification_of
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.stages import weight_audit
from accel.testing.subject import NEW_TOKENS, UNIQUE_TOKENS, random_model
from tests.conftest import overrides_for
from tests.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("low_bit")]

# A tied encoder-decoder, products with biases, an untied Llama, and speech; and the first beside FP16, emulated.
CASES = ["int8 t5", "int8 gpt2", "int4 gpt2", "int8 llama", "int8 whisper", "int8-fp16 t5"]
SUFFIXES = {"int8": "_int8", "int4": "_q4", "int8-fp16": "_int8"}


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> tuple[str, dict[str, Artifact]]:
    """Precision, and the artifacts of the stages up to `verify`, of a tiny random model.

    Tokens of random weights depend on rounding, so neither trials nor verification judge them.
    """
    precision, family = request.param.split()
    checkpoint = shared / "low_bit" / family
    if not (checkpoint / "config.json").is_file():
        random_model(FAMILIES[family]).save_pretrained(checkpoint)
    stages = "stage=[audit,convert,merge,verify]"
    limits = ["verify.min_token_agreement=0", "precision.max_token_changes=1", "precision.max_divergence=1"]
    overrides = overrides_for(checkpoint, artifacts, stages, f"precision={precision}", *limits)
    return precision, execute(compose(overrides))


@pytest.fixture(scope="module")
def model(built: tuple[str, Mapping[str, Artifact]]) -> Iterator[AcceleratedModel]:
    """The deployable, opened."""
    with load(built[1]["verify"].folder) as opened:
        yield opened


def test_all_products_are_quantized(built: tuple[str, Mapping[str, Artifact]]) -> None:
    """By the plan and in the graphs; the files have the suffix of the precision."""
    precision, stages = built
    plan = weight_audit.read_plan(stages["audit"].folder)
    assert {choice.reason for choice in plan.weights.values()} == {""}
    assert all(share["weight_bytes"] == 1 for share in stages["convert"].summary.values()), stages["convert"].summary
    folder = stages["verify"].folder
    verification = verification_of(folder)
    assert verification is not None
    assert (verification["passed"], verification["precision"]) == (True, precision.removesuffix("-fp16"))
    graphs = layout.first_variant(folder).graphs
    assert graphs
    assert all(path.stem.endswith(SUFFIXES[precision]) for path in graphs)


def test_every_weight_is_stored_once(built: tuple[str, Mapping[str, Artifact]]) -> None:
    """The merged decoder is as large as the larger of its two graphs."""
    summary = built[1]["merge"].summary
    prefill_only = summary["prefill_bytes"] - summary["shared_bytes"]
    assert summary["merged_bytes"] <= summary["decode_bytes"] + prefill_only + 4096, summary
    assert summary["shared_bytes"] >= 0.95 * summary["decode_bytes"], summary


def test_rows_of_a_padded_batch_have_the_tokens_that_they_have_alone(
    built: tuple[str, Mapping[str, Artifact]], model: AcceleratedModel
) -> None:
    """Activations are rounded row by row; with beams as well."""
    if model.config.model_type == "whisper":
        pytest.skip("sound is not padded by a mask")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0  # padding on the left, as decoder-only models need it
    ids = torch.where(mask == 1, ids, model.config.pad_token_id)
    options = UNIQUE_TOKENS | {"suppress_tokens": [model.config.pad_token_id]}
    for beams in (1, 3):
        tokens = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **options)[:, -NEW_TOKENS:]
        assert len({tuple(row) for row in tokens.tolist()}) == 3
        for row in range(3):
            alone = {"input_ids": ids[row, mask[row] == 1][None], "attention_mask": mask[row, mask[row] == 1][None]}
            single = model.generate(**alone, num_beams=beams, **options)[0, -NEW_TOKENS:]
            assert single.tolist() == tokens[row].tolist(), f"row {row}, {beams} beams"
