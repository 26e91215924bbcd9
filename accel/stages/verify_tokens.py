"""Compare generated tokens, and scores of generated texts, with PyTorch's: a part of `verify`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from accel import progress
from accel.config.schema import Config
from accel.data import texts
from accel.evaluation import metrics
from accel.evaluation.recorded_generation import RecordedGeneration, recording
from accel.evaluation.reference_data import PATHS
from accel.evaluation.verification_result import VerificationResult
from accel.models.generation import AcceleratedModel
from accel.stages import reference
from accel.stages.near_ties import GATED, DifferingSequence

MAX_DIFFERING = 20  # differing sequences that a verification result holds


def generate_greedily(
    model: AcceleratedModel, config: Config, inputs: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, list[list[int]]], list[tuple[list[int], RecordedGeneration]]]:
    """Generate by the method `greedy` on a CPU, and record the logits.

    Returns:
        `greedy` -> the ids, and ids and calls of each generation; nothing where it wasn't generated or recorded.
    """
    if model.device.type != "cpu":  # `compare_paths` decodes there without reading a result between two tokens
        return {}, []
    try:
        with recording(model.runtime, PATHS) as generations:
            greedy = reference.decode_case(model, "greedy", reference.cases(config)["greedy"], inputs, config.verify)
    except RuntimeError:  # `compare_tokens` generates again, and reports it
        return {}, []
    recorded = zip(greedy, generations, strict=False) if len(generations) == len(greedy) else []
    return {"greedy": greedy}, [(ids, calls) for ids, calls in recorded if calls is not None]


def compare_tokens(
    model: AcceleratedModel,
    folder: Path,
    config: Config,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Any,
    verification: VerificationResult,
    known: Mapping[str, list[list[int]]],
) -> list[DifferingSequence]:
    """Generate by every decoding method, and record in `verification` which sequences equal PyTorch's.

    Args:
        model: The bundle's model.
        folder: Folder of the checkpoint, which holds the tokenizer.
        config: The configuration.
        inputs: The inputs that the reference was generated for, [1, source] each.
        expected: Content of the reference's `tokens.json`.
        verification: Updated in place.
        known: Decoding method -> what it generated already.

    Returns:
        The sequences that differ, of methods without random choice.
    """
    methods = reference.cases(config)
    verification.inputs = len(inputs)
    tokenizer = texts.load_tokenizer(folder) if expected["texts"] else None
    differing: list[DifferingSequence] = []

    def shown(number: int, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
        """Return input `number` and both outputs as text, without the prompt of a decoder-only model."""
        prompt = 0 if model.config.is_encoder_decoder else inputs[number]["input_ids"].shape[1]
        text = expected["texts"][number] if expected["texts"] else f"input {number}"
        return {
            "input": text,
            "pytorch": _readable(tokenizer, theirs, prompt),
            "ours": _readable(tokenizer, ours, prompt),
        }

    for name, options in progress.track(list(methods.items()), "tokens"):
        torch_sequences = expected["tokens"][name]
        verification.sequences[name] = len(torch_sequences)
        try:
            sequences = known.get(name) or reference.decode_case(model, name, options, inputs, config.verify)
        except RuntimeError as error:  # torch refuses to sample from logits that aren't finite
            verification.failures.append(f"{name}: {str(error).splitlines()[0]}")
            verification.identical[name] = 0.0
            continue
        pairs = list(enumerate(zip(sequences, torch_sequences, strict=True)))
        different = [DifferingSequence(name, number, *both) for number, both in pairs if both[0] != both[1]]
        verification.first_difference |= {each.key: each.position for each in different}
        verification.identical[name] = (len(pairs) - len(different)) / len(pairs)
        if name in GATED:
            differing += different
        if name == "padded" and expected["texts"]:
            verification.samples = [shown(number, ours, theirs) for number, (ours, theirs) in pairs]
    for each in differing[:MAX_DIFFERING]:
        record = {"key": each.key, "case": each.method, "position": each.position}
        verification.differing.append(record | shown(each.number, each.ours, each.theirs))
    return differing


def _readable(tokenizer: Any, ids: Sequence[int], prompt: int) -> str:
    """Return ids after the first `prompt` ones as text, or without a tokenizer all as numbers."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(list(ids[prompt:]), skip_special_tokens=True))


def compare_references(
    model: AcceleratedModel, folder: Path, config: Config, expected: list[str], verification: VerificationResult
) -> None:
    """Score the references' outputs, PyTorch's and the bundle's, and record the metrics in `verification`.

    Nothing is recorded without references, accepted outputs or a tokenizer.

    Args:
        model: The bundle's model.
        folder: Folder of the checkpoint.
        config: The configuration.
        expected: PyTorch's outputs for the references.
        verification: Updated in place.
    """
    examples = reference.references(config, folder)
    tokenizer = texts.load_tokenizer(folder)
    if examples is None or not examples.accepted or tokenizer is None:
        return
    examples = examples.first(config.verify.references)
    outputs = reference.decode_texts(model, tokenizer, examples.texts, reference.REFERENCE_BATCH)
    names = config.verify.metrics
    verification.references = len(examples.texts)
    verification.metrics = {
        "pytorch": metrics.scores(names, expected, examples.accepted),
        "ours": metrics.scores(names, outputs, examples.accepted),
    }
    verification.metric_losses = {
        name: metrics.metric_loss(name, outputs, expected, examples.accepted) for name in names
    }
