"""Near ties of differing sequences, against PyTorch's own probabilities and scores of beam search."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from accel.adapters import registry
from accel.config.schema import Config, PrecisionConfig
from accel.data import texts
from accel.evaluation.divergence import change_divergence
from accel.evaluation.verification_result import VerificationResult, count_sequences
from accel.models.checkpoints import BUILT_IN, load_model
from accel.pipeline.runner import Pipeline
from accel.runtime import layout
from accel.stages import near_ties, reference, verify
from accel.stages.near_ties import DifferingSequence
from tests.conftest import Build

GREEDY = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
BEAMS = GREEDY | {"num_beams": 16}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The embedded T5, whose sequences end before `max_new_tokens` or don't."""
    return load_model(BUILT_IN / "t5-g2p")


def encode(word: str) -> Mapping[str, Tensor]:
    return texts.encode(texts.load_tokenizer(BUILT_IN / "t5-g2p"), [word])


def n_best(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[list[list[int]], Tensor]:
    """Return the texts of a beam search, best first, as `generate_ids` does, and their scores by transformers."""
    settings = GenerationConfig(
        **{**model.generation_config.to_diff_dict(), "max_length": None, **BEAMS},
        num_return_sequences=BEAMS["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = model.generate(**inputs, generation_config=settings)
    keep = int(model.generation_config.pad_token_id != model.generation_config.eos_token_id)
    end = model.generation_config.eos_token_id
    sequences = [sequence[: (*sequence, end).index(end) + keep] for sequence in found.sequences.tolist()]
    return sequences, found.sequences_scores


@pytest.mark.parametrize("changes", [{}, {"length_penalty": 0.4}, {"pad_token_id": 1}], ids=str)
def test_margin_of_beams_is_that_of_the_scores(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, float]
) -> None:
    """Texts of one length and of different ones, and where the id that ends a text is removed as padding."""
    inputs = encode("zhao")
    for name, value in changes.items():
        monkeypatch.setattr(model.generation_config, name, value)
    penalty = changes.get("length_penalty", 1.0)
    sequences, scores = n_best(model, inputs)
    removed = model.generation_config.pad_token_id == model.generation_config.eos_token_id
    lengths = [len(ids) - 1 + removed for ids in sequences]
    assert len(set(lengths)) > 1, "all texts have one length"
    for other in range(1, len(sequences)):
        differing = DifferingSequence("beams", 0, sequences[other], sequences[0])
        margin = near_ties._beam_margin(model, inputs, BEAMS, differing)
        expected = float(scores[0] - scores[other]) * max(lengths[0], lengths[other]) ** penalty
        assert margin == pytest.approx(expected, rel=1e-3, abs=1e-4)
        p = 1 / (1 + math.exp(-expected))
        needed = near_ties.needed_divergence(model, inputs, BEAMS, differing)
        assert needed == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), rel=1e-2, abs=1e-6)
    better = DifferingSequence("beams", 0, sequences[0], sequences[3])
    assert near_ties.needed_divergence(model, inputs, BEAMS, better) == 0


def test_greedy_search_by_the_probabilities_at_the_first_difference(model: PreTrainedModel) -> None:
    """The tokens after it don't count, nor does how likely the text before it is."""
    inputs = encode("photosynthesis")
    (theirs,) = reference.generate_ids(model, [inputs], GREEDY)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=torch.tensor([theirs])).logits[0]
    for position in (1, 5, len(theirs) - 1):
        probabilities = logits[position - 1].double().softmax(-1)
        other = int(probabilities.argsort(descending=True)[1])
        ours = [*theirs[:position], other, 9, 9]
        needed = near_ties.needed_divergence(model, inputs, GREEDY, DifferingSequence("greedy", 0, ours, theirs))
        expected = change_divergence(probabilities[theirs[position]], probabilities[other])
        assert needed == pytest.approx(float(expected), rel=1e-3)


def test_counts(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counts of each method, by the limit of the precision; no model is loaded where nothing differs."""
    inputs = encode("photosynthesis")
    monkeypatch.setattr(near_ties, "load_model", lambda folder: model)
    (theirs,) = reference.generate_ids(model, [inputs], GREEDY)
    ours = [*theirs[:4], 40, 41]
    differing = [DifferingSequence(name, 0, ours, theirs) for name in ("greedy", "padded")]
    needed = near_ties.needed_divergence(model, inputs, GREEDY, differing[0])
    for limit, tied in ((needed * 1.01, 1), (needed * 0.99, 0)):
        result = VerificationResult(
            identical={"greedy": 0.5, "padded": 0.75, "beams": 1.0}, sequences={"greedy": 2, "padded": 4, "beams": 4}
        )
        config = Config(precision=PrecisionConfig(name="int8", weight_bits=8, max_divergence=limit))
        near_ties.count_near_ties(config, tmp_path, [inputs], differing, result)
        assert result.near_ties == {"greedy": tied, "padded": tied, "beams": 0}
        assert [result.agreeing(name) for name in ("greedy", "padded", "beams")] == [0.5 + tied / 2, 0.75 + tied / 4, 1]
        assert result.needed_divergence == {"greedy.0": pytest.approx(needed), "padded.0": pytest.approx(needed)}
    monkeypatch.setattr(near_ties, "load_model", None)
    result = VerificationResult()
    near_ties.count_near_ties(config, tmp_path, [inputs], [], result)
    assert result.near_ties == {"greedy": 0, "beams": 0, "padded": 0}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_broken_weights_are_no_near_ties(build: Build, tmp_path: Path, factor: float) -> None:
    """`verify` refuses a bundle of 8 bits in which one weight is lost, because hardly a difference is a near tie."""
    overrides = ["model.checkpoint=accel://t5-g2p", "precision=int8", "audit.trials=0", "verify.references=0"]
    overrides.append("precision.weight_formats=[block-64]")  # of several, the fastest at the moment is chosen
    config, _ = build(Path("t5-g2p"), "merge", overrides)
    architecture = registry.build(config.architecture)
    pipeline = Pipeline(config, architecture)
    inputs = {name: pipeline.artifact(name) for name in verify.input_stages(config)}
    folder = tmp_path / "bundle"
    shutil.copytree(inputs["merge"].folder, folder)
    decoder = layout.first_variant(folder).decoder
    graph = onnx.load(decoder)
    name = "decoder.block.1.layer.1.EncDecAttention.o.weight.int8.scales"
    (scales,) = [initializer for initializer in graph.graph.initializer if initializer.name == name]
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(factor), name))
    for path in decoder.parent.glob(f"{decoder.name}*"):
        path.unlink()
    onnx.save(graph, decoder)
    result = VerificationResult(precision=config.precision.variant)
    verify.examine(folder, config, inputs, architecture, result)
    counts = {method: count_sequences(asdict(result), method) for method in near_ties.GATED}
    if factor == 1:
        assert result.passed, result.failures
        assert sum(other for _, _, other in counts.values()) <= 2, counts  # of 16
    else:
        assert all(identical == 0 and tied <= 1 for identical, tied, _ in counts.values()), counts
        assert any("verify.min_token_agreement requires at least 50.0%" in failure for failure in result.failures)
