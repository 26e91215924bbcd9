"""Parity of an unverified bundle's outputs with float64: by component, and by token along a greedy generation."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.adapters.types import Architecture, Component
from accel.evaluation import reference_data
from accel.evaluation.compare import Difference, magnitude, output_mask, token_errors
from accel.evaluation.component_runner import ComponentRunner, Run, signatures
from accel.evaluation.divergence import Divergence
from accel.evaluation.recorded_generation import RecordedGeneration, logits_along
from accel.evaluation.rounding import allowed_errors
from accel.evaluation.verification_result import Drift, VerificationResult
from accel.models.generation import AcceleratedModel
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.streams import on_shared_stream

# On a GPU: the first call at a shape runs normally, the second is captured as a CUDA graph, the third replays it.
PASSES = 3


def compare_outputs(
    model: AcceleratedModel,
    architecture: Architecture,
    reference: Path,
    torch_errors: Mapping[str, Tensor],
    verification: VerificationResult,
) -> bool:
    """Run every component at the reference's inputs through the runtime and compare every output.

    Covers both branches of the merged decoder.

    Args:
        model: Model under test.
        architecture: Its adapter.
        reference: Folder of the `reference` artifact.
        torch_errors: PyTorch's own errors, as the stage `torch_error` wrote them.
        verification: Result to add the errors and failures to.

    Returns:
        True if all outputs have the right shapes and are finite, so that it makes sense to generate.
    """
    comparable = True
    self_attention_caches = {spec.name for spec in architecture.signature(model.config, Component.DECODE).outputs}
    numbered_calls = enumerate(reference_data.read_calls(reference))
    for _, group in groupby(numbered_calls, key=lambda item: item[1].description):
        sequence = list(group)
        calls = [call for _, call in sequence]
        with on_shared_stream(model.device):  # as `generate` does, and as capturing a CUDA graph needs
            for _ in range(PASSES if model.device.type == "cuda" else 1):
                sequence_outputs = _run_sequence(model, architecture, calls)
        for (number, call), outputs in zip(sequence, sequence_outputs, strict=True):
            for name, expected in call.expected.items():
                compared = measure(
                    verification,
                    f"{call.component}.{name}",
                    call.description,
                    outputs[name],
                    expected,
                    torch_errors.get(f"{number}.{name}"),
                    output_mask(call.component, name, call.inputs, expected, self_attention_caches),
                )
                comparable = comparable and compared
    return comparable


def _run_sequence(
    model: AcceleratedModel, architecture: Architecture, calls: Sequence[reference_data.Call]
) -> list[dict[str, Tensor]]:
    """Run the calls of one generation through the runtime, and return the outputs of each in host memory.

    The decoder takes the reference's encoder outputs, so that errors of the encoder don't count against the decoder.
    """
    runner = ComponentRunner(signatures(architecture, model.config), _runtime_run(model, architecture))
    sequence_outputs = []
    for call in calls:
        outputs = runner(call.component, call.inputs)
        sequence_outputs.append({name: outputs[name].cpu() for name in call.expected})
        if call.component is Component.ENCODER:
            runner.values |= call.expected
    return sequence_outputs


def _runtime_run(model: AcceleratedModel, architecture: Architecture) -> Run:
    """Return a function that runs components through the runtime, which keeps the decoder's caches itself."""
    cache = architecture.signature(model.config, Component.DECODE).cache
    state: Any = None

    def run(component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        nonlocal state
        if component is Component.ENCODER:
            return model.runtime.encode(inputs)
        if component is Component.PREFILL:
            logits, state = model.runtime.prefill(inputs)
        else:
            logits = model.runtime.decode(inputs, state)
        views = state.views()
        return {"logits": logits} | {output: views[name] for name, output in cache.items()}

    return run


def compare_paths(
    model: AcceleratedModel,
    architecture: Architecture,
    reference: Path,
    torch_errors: Mapping[str, Tensor],
    verification: VerificationResult,
    rerouted: float = 0.0,
    recorded: Sequence[tuple[Sequence[int], RecordedGeneration]] = (),
) -> bool:
    """Decode the sequences that PyTorch generated, each new token by itself, and compare the logits at every token.

    No result is read between two tokens, so that a missing synchronization on a GPU gives wrong logits here, too.
    Where `generate` decoded the same tokens before, its own logits are compared.

    Args:
        model: Model under test.
        architecture: Its adapter.
        reference: Folder of the `reference` artifact.
        torch_errors: PyTorch's own errors, as the stage `torch_error` wrote them.
        verification: Result to add the errors and failures to.
        rerouted: Share of a sequence's tokens, those with the largest errors, that don't count: see `verify.REROUTED`.
        recorded: For the first sequences, what the model under test generated for the same inputs: ids and calls.

    Returns:
        True if all logits have the right shapes and are finite.
    """
    comparable = True
    path_errors: list[Tensor] = []
    path_torch_errors: list[Tensor] = []
    for number, path in enumerate(reference_data.read_paths(reference)):
        logits = None
        if number < len(recorded) and list(recorded[number][0]) == path.ids[0].tolist():
            prompt = 1 if Component.ENCODER in architecture.components() else path.inputs["input_ids"].shape[1]
            logits = logits_along(model.runtime, recorded[number][1], path.ids.to(model.device), prompt)
        if logits is None:
            logits = _path_logits(model, architecture, path)
        errors = (logits.cpu().double() - path.logits).abs()[0]  # [tokens, vocabulary]
        path_errors.append(errors)
        worst_first = errors.amax(-1).argsort(descending=True)
        mask = torch.ones(1, len(worst_first), dtype=torch.int64)
        mask[:, worst_first[: int(rerouted * len(worst_first))]] = 0
        torch_error = torch_errors.get(f"path-{number}.logits")
        if torch_error is not None:
            path_torch_errors.append(torch_error[0])
        description = f"a generation, input {number}"
        compared = measure(verification, "path.logits", description, logits, path.logits, torch_error, mask)
        comparable = comparable and compared
        verification.drift.scale = max(verification.drift.scale, magnitude(path.logits))
    _add_drift(verification.drift, path_errors, path_torch_errors)
    return comparable


def compare_distributions(
    model: AcceleratedModel, architecture: Architecture, folder: Path, allowed: float, verification: VerificationResult
) -> None:
    """Compute the logits along texts in as few calls as possible, and record their divergence in `verification`.

    Args:
        model: Model under test.
        architecture: Its adapter.
        folder: Folder of the `text_logits` artifact.
        allowed: Largest mean divergence, in nats.
        verification: Updated in place.
    """
    divergence = Divergence()
    for number, path in enumerate(reference_data.read_paths(folder)):
        divergence.add(number, _path_logits(model, architecture, path, at_once=True)[0], path.logits[0])
    verification.divergence = {
        "tokens": divergence.tokens,
        "texts": divergence.texts,
        "changed": divergence.changed,
        "clear_changes": int(divergence.clear_changes(allowed).total),
        "mean": divergence.mean,
        "standard_error": divergence.standard_error,
        "allowed": allowed,
    }
    if not divergence.mean <= allowed:
        verification.failures.append(
            f"the next token's distribution diverges from PyTorch's by {divergence.mean:.2g} nats (standard error "
            f"{divergence.standard_error:.1g}) on {divergence.tokens} tokens of {divergence.texts} texts, allowed "
            f"precision.max_divergence={allowed:g}"
        )


def _path_logits(
    model: AcceleratedModel, architecture: Architecture, path: reference_data.TokenPath, at_once: bool = False
) -> Tensor:
    """Run the ids of `path` through the runtime as a generation does: the prompt at once, then one token at a time.

    Beside an encoder, the prompt is the decoder's first token. With `at_once`, all ids are the prompt, or beside an
    encoder all but the first follow in one call. Returns the logits, [1, tokens, vocabulary].
    """
    context = _encoder_context(architecture, model, path.inputs)
    ids = path.ids.to(model.device)  # [1, tokens]
    mask = torch.ones_like(ids)
    has_encoder, tokens = Component.ENCODER in architecture.components(), ids.shape[1]
    prompt = 1 if has_encoder else tokens if at_once else path.inputs["input_ids"].shape[1]
    starts = [0, *range(prompt, tokens, tokens if at_once else 1)]
    ends = [*starts[1:], tokens]
    inputs = [decoder_inputs(ids[:, start:end], mask[:, :end]) for start, end in zip(starts, ends, strict=True)]
    with on_shared_stream(model.device):  # as `generate` does
        first_logits, state = model.runtime.prefill({**inputs[0], **context})
        logits = [first_logits]
        for token_inputs in inputs[1:]:
            logits.append(model.runtime.decode(token_inputs, state))
        return torch.cat(logits, dim=1)


def _add_drift(drift: Drift, path_errors: Sequence[Tensor], path_torch_errors: Sequence[Tensor]) -> None:
    """Add the statistics of every token position to `drift`.

    `path_errors`: [tokens, vocabulary] of each sequence. `path_torch_errors`: [tokens] of each sequence, if known.
    """
    for position in range(max(map(len, path_errors))):
        at_position = [one_path[position] for one_path in path_errors if position < len(one_path)]
        errors = torch.cat(at_position)
        drift.mean.append(float(errors.mean()))
        drift.p99.append(float(errors.kthvalue(1 + int(0.99 * (len(errors) - 1))).values))
        drift.worst.append(float(errors.max()))
        torch_errors = [float(one_path[position]) for one_path in path_torch_errors if position < len(one_path)]
        if torch_errors:
            drift.torch_worst.append(max(torch_errors) if all(map(isfinite, torch_errors)) else None)


def _encoder_context(
    architecture: Architecture, model: AcceleratedModel, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run the encoder on `inputs` and return the decoder inputs that come from it; none without an encoder."""
    if Component.ENCODER not in architecture.components():
        return {}
    values = {**inputs, **model.runtime.encode(inputs)}
    specs = architecture.signature(model.config, Component.PREFILL).inputs
    return {spec.name: values[spec.source] for spec in specs if spec.source}


def measure(
    verification: VerificationResult,
    name: str,
    description: str,
    found: Tensor,
    expected: Tensor,
    torch_error: Tensor | None,
    mask: Tensor | None = None,
) -> bool:
    """Add an output's error at its worst token to `verification`, and a failure if that is not allowed.

    A token passes within `verification.threshold` of the output's largest magnitude, or within `rounding.FACTOR` times
    PyTorch's own error at that token.

    Args:
        verification: Result to add to.
        name: Name of the output.
        description: Description of the inputs, for the message.
        found: Output of the bundle, [rows, ..., tokens, features].
        expected: Output of the reference, same shape.
        torch_error: PyTorch's own absolute error, [rows, tokens]; None if it isn't known.
        mask: Tokens that count, [rows, tokens], 0 or 1; None counts all. Values that are not finite always count.

    Returns:
        True if the output has the right shape and is finite.
    """
    if found.shape != expected.shape:
        verification.failures.append(f"{name} has shape {tuple(found.shape)}, PyTorch gives {tuple(expected.shape)}")
        return False
    scale = max(magnitude(expected), 1e-6)
    errors = token_errors(found, expected) / scale  # [rows, tokens]
    finite = bool(errors.isfinite().all())
    allowed = allowed_errors(torch_error, scale, verification.threshold, errors)  # [rows, tokens]
    if mask is not None:
        errors = torch.where((mask == 0) & errors.isfinite(), 0.0, errors)
    used = (errors / allowed).nan_to_num(torch.inf, torch.inf)
    ranking = used if used.max() > 1 else errors
    row, token = divmod(int(ranking.argmax()), used.shape[1])
    relative_torch_error = None
    if torch_error is not None and torch_error[row, token].isfinite():
        relative_torch_error = float(torch_error[row, token] / scale)
    difference = Difference(
        error=float(errors[row, token]),
        torch_error=relative_torch_error,
        allowed=float(allowed[row, token]),
        location=f"{description}: row {row + 1}, token {token + 1}",
    )
    previous = verification.outputs.get(name)
    if previous is None or previous.rank < difference.rank:
        verification.outputs[name] = difference
    if not difference.passed:
        torch_text = "unknown" if relative_torch_error is None else f"{relative_torch_error:.1e}"
        verification.failures.append(
            f"{name} is off by {difference.error:.1e} of its largest value, allowed {difference.allowed:.1e}, "
            f"PyTorch's own {verification.torch_dtype} {torch_text} ({difference.location})"
        )
    return finite
