"""Verify the unverified bundle against PyTorch: component outputs, logits along generations, generated tokens.

Reads:
    The bundle of `merge`; the checkpoint; `prompts.json` of `prompts`; the files of `reference` and `torch_error`; with
    weights in low bits those of `text_logits`; for the certificate the plans of `audit`, in 16 bits also the statistics
    of `calibrate`.

Writes:
    The deployable, if the bundle passes: the bundle's files, a model card, the verification result and the certificate,
    named by `accel.runtime.layout`.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.benchmark import latency
from accel.config.schema import Config
from accel.data import texts
from accel.errors import AccelError, DeviceMemoryError, VerificationError
from accel.evaluation.parity import compare_distributions, compare_outputs, compare_paths
from accel.evaluation.verification_result import VerificationResult
from accel.graph import files
from accel.graph.precision.emulate import emulate_half
from accel.graph.precision.formats import FORMATS, Format
from accel.models.loading import open_model
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact, folder_files
from accel.reporting import card, certificate, delivery
from accel.runtime import layout
from accel.runtime.engine_choice import engines_to_verify
from accel.stages import audit, calibrate, reference, torch_error, weight_audit
from accel.stages.checkpoint import reference_files
from accel.stages.near_ties import GATED, count_near_ties
from accel.stages.prompts import PROMPTS
from accel.stages.verify_tokens import compare_references, compare_tokens, generate_greedily

logger = logging.getLogger(__name__)

DEFAULT_MIN_AGREEMENT = 0.5  # of the sequences, in 16 or fewer bits, where `verify.min_token_agreement` is null
# Share of a path's tokens whose logits aren't compared where a router picks experts. Near a tie, rounding in 16 bits
# makes it pick others, and logits jump there and at the tokens that attend to it. A fault that affects every token,
# such as a stale cache, still shows in the rest.
REROUTED = 0.5
# Error of one layer with quantized weights, relative to an output's largest magnitude, at its worst token.
LOW_BIT_ERRORS = {"int8": 0.125, "int4": 0.5}
LOW_BIT_ADVICE = (
    "Try audit.texts=FILE with inputs like yours, a smaller precision.max_divergence (now "
    "{precision.max_divergence}; more weights stay in FP32), smaller blocks in precision.weight_formats, or "
    "precision=fp32"
)
MAX_FAILURES = 7  # failures that a message lists


def threshold(variant: str, layers: int) -> float:
    """Return the largest error allowed, relative to an output's largest magnitude.

    Rounding errors of independent operations add up like a random walk, hence the square root of the depth. The factors
    allow for the few units in the last place that the operations of one layer lose.

    Args:
        variant: Precision of the graphs, as `PrecisionConfig.variant` names it.
        layers: Depth of the decoder.
    """
    if variant in LOW_BIT_ERRORS:
        return float(LOW_BIT_ERRORS[variant] * max(1, layers) ** 0.5)
    return float((64 if variant == "float32" else 16) * FORMATS[variant].epsilon * max(1, layers) ** 0.5)


def min_token_agreement(config: Config) -> float:
    """Return the smallest share of sequences that must be identical to PyTorch's, from 0 to 1.

    By default all in FP32. In other precisions none for random weights, whose tokens depend on rounding. With weights
    in low bits, sequences that differ at a near tie count like identical ones: see `accel.stages.near_ties`.
    """
    if config.verify.min_token_agreement is not None:
        return config.verify.min_token_agreement
    if config.precision.exact:
        return 1.0
    return 0.0 if config.model.weights == "random" else DEFAULT_MIN_AGREEMENT


def judge(config: Config, verification: VerificationResult) -> None:
    """Add to `verification.failures` each breach of `verify.min_token_agreement` and `verify.max_metric_loss`."""
    minimum = min_token_agreement(config)
    if any(verification.agreeing(name) < minimum for name in GATED):
        shares = ", ".join(f"{name} {verification.agreeing(name):.1%}" for name in verification.identical)
        or_tied = " or different at a near tie" if verification.near_ties else ""
        verification.failures.append(
            f"sequences identical to PyTorch's{or_tied}: {shares}; verify.min_token_agreement requires at least "
            f"{minimum:.1%} (sampling excepted)"
        )
    allowed = config.verify.max_metric_loss
    for name, loss in verification.metric_losses.items():
        if loss.points > allowed:
            ours, theirs = verification.metrics["ours"][name], verification.metrics["pytorch"][name]
            unsure = f"; {verification.references} are too few to be sure (verify.references, verify.texts)"
            verification.failures.append(
                f"{name} of {verification.references} references is {ours:.2f}%, PyTorch's {theirs:.2f}%: worse by "
                f"{loss}, allowed verify.max_metric_loss={allowed}" + ("" if loss.surely_exceeds(allowed) else unsure)
            )
    if verification.failures:
        clear = [each for each in verification.differing if not verification.is_near_tie(each["key"])]
        for sequence in clear[:3]:
            verification.failures.append(
                f"{sequence['case']}, {sequence['input'][:60]!r}: first differing token at {sequence['position']}"
            )


def advice(config: Config) -> str:
    """Return what to try after a failed verification."""
    if config.precision.exact:
        return "FP32 parity failed: likely a bug in the adapter or a graph pass"
    if config.precision.weight_bits is not None:
        return LOW_BIT_ADVICE.format(precision=config.precision)
    options = ["audit.texts=FILE with inputs like yours", "a larger audit.overflow_margin (more stays in FP32)"]
    if config.precision.plan != "rules":
        options.append("precision=fp16-rules" if config.precision.plan == "minimized" else "precision=fp16")
    if config.precision.dtype != "bfloat16":
        options.append("precision=bf16 where the GPU has it")
    return f"Try {', '.join(options)}, or precision=fp32"


def routes_experts(folder: Path) -> bool:
    """Return whether the decoder in `folder` is a mixture of experts, whose router picks by computed scores."""
    decoder = files.load(layout.first_variant(folder).decoder)
    return any(node.op_type == "TopK" for node in decoder.graph.all_nodes())


def emulate_bundle(bundle: Path, folder: Path, format: Format) -> Path:
    """Write a copy of `bundle` whose graphs emulate 16-bit arithmetic in FP32 (see `accel.graph.precision.emulate`).

    Args:
        bundle: The unverified bundle.
        folder: Existing folder to write into.
        format: The 16-bit format.

    Returns:
        `folder`.
    """
    shutil.copytree(bundle, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx"))
    for path in layout.first_variant(bundle).graphs:
        model = files.load(path)
        emulate_half(model, format)
        files.save_graph(model, folder / path.relative_to(bundle))
    return folder


def examine(
    folder: Path,
    config: Config,
    inputs: Mapping[str, Artifact],
    architecture: Architecture,
    verification: VerificationResult,
) -> None:
    """Compare the model in `folder` with the reference, and fill in `verification`.

    Stops early where outputs have wrong shapes or aren't finite, because nothing can be generated then.

    Args:
        folder: The unverified bundle, or its emulation.
        config: The configuration.
        inputs: The stage's input artifacts.
        architecture: The adapter of the model.
        verification: Updated in place.
    """
    checkpoint, expected = inputs["checkpoint"].folder, inputs["reference"].folder
    torch_errors = torch_error.read_errors(inputs["torch_error"].folder)
    prompts = texts.read_prompts(inputs["prompts"].folder / PROMPTS)
    with open_model(folder, config.runtime) as model:
        verification.engine = model.runtime.engine
        layers = len(architecture.signature(model.config, Component.DECODE).outputs) // 2
        verification.threshold = threshold(config.precision.variant, layers)
        model_inputs, _ = reference.verification_inputs(config, checkpoint, architecture, model.config, prompts)
        if not compare_outputs(model, architecture, expected, torch_errors, verification):
            return
        rerouted = REROUTED if not config.precision.exact and routes_experts(folder) else 0.0
        known, recorded = generate_greedily(model, config, model_inputs)
        if not compare_paths(model, architecture, expected, torch_errors, verification, rerouted, recorded):
            return
        tokens = json.loads((expected / reference.TOKENS).read_text())
        differing = compare_tokens(model, checkpoint, config, model_inputs, tokens, verification, known)
        compare_references(model, checkpoint, config, tokens["references"], verification)
        if config.precision.weight_bits is not None:
            logits, allowed = inputs["text_logits"].folder, config.precision.max_divergence
            compare_distributions(model, architecture, logits, allowed, verification)
    if config.precision.weight_bits is not None:
        count_near_ties(config, checkpoint, model_inputs, differing, verification)
    judge(config, verification)
    verification.passed = not verification.failures


def examine_by_engines(
    folder: Path, config: Config, inputs: Mapping[str, Artifact], architecture: Architecture
) -> VerificationResult:
    """Compare the model in `folder` with the reference by each engine of the runtime, until one passes.

    Args:
        folder: See `examine`, as for the other arguments.
        config: The configuration.
        inputs: The stage's input artifacts.
        architecture: The adapter of the model.

    Returns:
        The result with the first engine that passes; if none does, with the last one.
    """
    runtime, dtype = config.runtime, config.precision.dtype
    engines = [runtime.engine]
    if runtime.static:
        engines = engines_to_verify(runtime.engine, torch.device(runtime.device), dtype)
    for engine in engines:
        result = VerificationResult(
            precision=config.precision.variant,
            dtype=dtype,
            torch_dtype=torch_error.comparable_dtype(config.precision),
            execution="native" if runtime.compute_dtype.get(dtype) == dtype else "emulated",
            runtime=runtime.name,
        )
        try:
            # All prompts by the engine: as the graphs are compared beside it, both ways to compute them are verified.
            examined = replace(runtime, engine=engine, fused_prefill=0)
            examine(folder, replace(config, runtime=examined), inputs, architecture, result)
        except DeviceMemoryError:
            raise
        except AccelError as error:
            if engine == engines[-1]:
                raise
            result.failures.append(str(error))
        if result.passed:
            break
        if engine != engines[-1]:
            logger.warning(f"decode steps by {engine} are not verified, {engines[-1]} is next: {result.failures[0]}")
    return result


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write the deployable. Return the summary of the verification.

    Where the runtime's provider doesn't compute in the graphs' precision, an emulation is verified instead.

    Raises:
        VerificationError: The bundle didn't pass.
    """
    bundle, dtype = inputs["merge"].folder, config.precision.dtype
    native = config.runtime.compute_dtype.get(dtype) == dtype
    latency.prepare(config, "cuda")
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tested = bundle if native else emulate_bundle(bundle, Path(scratch), FORMATS[dtype])
        verification = examine_by_engines(tested, config, inputs, architecture)
    if not verification.passed:
        failures = "\n".join(list(dict.fromkeys(verification.failures))[:MAX_FAILURES])
        how = f"{verification.precision}, {verification.execution}"
        message = f"verification of the bundle failed ({how}):\n{failures}\n{advice(config)}"
        if config.precision.weight_bits is not None:
            message += f"; {weight_audit.read_plan(inputs['audit'].folder).describe_worst()}"
        raise VerificationError(message, summarize(verification, inputs, None))
    latency.prepare(config, "cpu")
    # Copied: onnx refuses weights in a file with more than one hard link.
    shutil.copytree(bundle, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(layout.MANIFEST))
    verification.files.update({name: record.sha256 for name, record in folder_files(out).items()})
    deployable = layout.first_variant(out)
    deployable.verification.write_text(json.dumps(asdict(verification), indent=1))
    measured = latency.compare_with_torch(out, config, inputs, architecture) if config.verify.latency else None
    explained = {}
    if "audit" in inputs and config.precision.weight_bits is not None:
        explained = certificate.explain_weights(weight_audit.read_plan(inputs["audit"].folder))
    if "audit" in inputs and config.precision.dtype != "float32":
        plans = audit.read_plans(inputs["audit"].folder)
        statistics, rows = calibrate.read_statistics(inputs["calibrate"].folder)
        explained |= certificate.explain(plans, statistics, rows)
    certificate.write(deployable, asdict(verification), measured, explained, config, inputs)
    card.write(out)
    return summarize(verification, inputs, measured)


def summarize(
    verification: VerificationResult, inputs: Mapping[str, Artifact], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the summary for the manifest and a sweep's table.

    Args:
        verification: The verification result, passed or not.
        inputs: The stage's input artifacts.
        measured: Latency and memory beside PyTorch's, or None if not measured.
    """
    mixes = inputs["convert"].summary.values()  # of precisions, one a component; none where all is FP32
    low_bits = [mix["weight_bytes"] for mix in mixes if "low_bit_products" in mix]
    return {
        "passed": verification.passed,
        "execution": verification.execution,
        "engine": verification.engine,
        "identical": verification.identical,
        "near_ties": verification.near_ties,
        "sequences": verification.sequences,
        "metrics": verification.metrics,
        "metric_losses": {name: asdict(loss) for name, loss in verification.metric_losses.items()},
        "divergence": verification.divergence,
        "worst_logits": max(verification.drift.worst, default=None),
        "fp32_nodes": sum(mix.get("fp32_nodes", 0) for mix in mixes) if mixes else "all",
        "casts": sum(mix.get("casts", 0) for mix in mixes),
        "low_bit_share": min(low_bits, default=None),
        "decoder_bytes": inputs["merge"].summary["merged_bytes"],
        "speed": measured,
    }


def deliver(config: Config, folder: Path) -> None:
    """Copy the deployable to the folder `output`, if it is given."""
    if config.output is not None:
        delivery.deliver(folder, Path(config.output))
        progress.note(f"deployable copied to {config.output}")


def input_stages(config: Config) -> tuple[str, ...]:
    """Return the stages whose artifacts this one reads.

    `audit` unless all is in FP32, `calibrate` in 16 bits, `text_logits` with weights in low bits.
    """
    precision = config.precision
    audit = () if precision.exact else ("audit",)
    statistics = ("calibrate",) if precision.dtype != "float32" else ()
    logits = ("text_logits",) if precision.weight_bits is not None else ()
    return ("checkpoint", "prompts", "convert", "merge", "reference", "torch_error", *logits, *statistics, *audit)


STAGE = Stage(
    name="verify",
    run=run,
    inputs=input_stages,
    sections=("model", "precision", "runtime", "verify"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "sacrebleu"),
    files=reference_files,
    deliver=deliver,
)
