"""Proves a candidate against PyTorch: outputs, logits along a path, tokens. A deployable is what passed."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.benchmark import latency
from accel.config.schema import Config
from accel.data import texts
from accel.errors import VerificationError
from accel.evaluation import metrics
from accel.evaluation.parity import VerificationResult, compare_outputs, compare_paths
from accel.graph import files
from accel.graph.precision.emulate import emulate_half
from accel.graph.precision.formats import FORMATS, Format
from accel.models.generation import AcceleratedModel
from accel.models.loading import open_model
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.reporting import certificate
from accel.runtime import layout
from accel.runtime.layout import MANIFEST
from accel.stages import audit, calibrate, prompts, reference, torch_error
from accel.stages.checkpoint import reference_files

GATED = ("greedy", "beams", "padded")  # sampling draws another token at the least difference
LEAST = 0.5  # of the sequences, where `verify.min_token_agreement` is null and the graph in 16 bits
# Near a tie, rounding lets a router pick other experts: logits jump there, and at the tokens that attend to it. In 16
# bits this share of a path may; what is wrong everywhere, as a stale cache is, shows in the other half.
REROUTED = 0.5
SHOWN = 20  # differing sequences that a verdict holds


def threshold(dtype: str, layers: int) -> float:
    """The largest difference allowed, relative to an output's largest value.

    Rounding errors of independent operations add up like a random walk, so with the square root of the depth; an
    operation of a layer may lose a few units in the last place, which the factors allow for.
    """
    return float((64 if dtype == "float32" else 16) * FORMATS[dtype].step * max(1, layers) ** 0.5)


def least_agreement(config: Config) -> float:
    """The share of sequences that must be PyTorch's: all in FP32; random weights decide by rounding in 16 bits."""
    given = config.verify.min_token_agreement
    if given is not None:
        return given
    if config.precision.dtype == "float32":
        return 1.0
    return 0.0 if config.model.weights == "random" else LEAST


def compare_tokens(
    model: AcceleratedModel,
    folder: Path,
    config: Config,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Any,
    verification: VerificationResult,
) -> None:
    """Generate for the reference's inputs under every case, and count the sequences that are the same."""
    compared, verification.inputs = reference.cases(config), len(inputs)
    tokenizer = texts.load_tokenizer(folder) if expected["texts"] else None

    def readable(number: int, ids: Sequence[int]) -> str:
        """What the model generated for an input; what a decoder-only model continues is left out."""
        if tokenizer is None:
            return " ".join(map(str, ids))
        begin = 0 if model.config.is_encoder_decoder else inputs[number]["input_ids"].shape[1]
        return str(tokenizer.decode(list(ids[begin:]), skip_special_tokens=True))

    for name, options in progress.track(list(compared.items()), "tokens"):
        right = expected["tokens"][name]
        try:
            found = reference.decode_case(model, name, options, inputs, config.verify)
        except RuntimeError as error:  # torch refuses to sample from what is not finite
            verification.failures.append(f"{name}: {str(error).splitlines()[0]}")
            verification.identical[name] = 0.0
            continue
        verification.identical[name] = sum(map(list.__eq__, found, right)) / len(right)
        for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
            if ours == theirs:
                continue
            pairs = enumerate(zip(ours, theirs, strict=False))
            position = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            verification.first_difference[f"{name}.{number}"] = position
            if name in GATED and len(verification.differing) < SHOWN:
                given = expected["texts"][number] if expected["texts"] else f"input {number}"
                said = {"pytorch": readable(number, theirs), "ours": readable(number, ours)}
                verification.differing.append({"case": name, "input": given, "position": position, **said})
        if name == "greedy" and expected["texts"]:
            verification.samples = [
                {"input": line, "pytorch": readable(number, theirs), "ours": readable(number, ours)}
                for number, (line, theirs, ours) in enumerate(zip(expected["texts"], right, found, strict=True))
            ]


def compare_references(
    model: AcceleratedModel, folder: Path, config: Config, expected: list[str], verification: VerificationResult
) -> None:
    """The metrics on the references, PyTorch's beside ours."""
    known = reference.references(config, folder)
    tokenizer = texts.load_tokenizer(folder)
    if known is None or not known.accepted or tokenizer is None:
        return
    known = known.first(config.verify.references)
    found = reference.decode_texts(model, tokenizer, known.texts, batch_size=50)
    verification.references = len(known.texts)
    names = config.verify.metrics
    verification.metrics = {
        side: metrics.scores(names, outputs, known.accepted)
        for side, outputs in (("pytorch", expected), ("ours", found))
    }


def judge(config: Config, verification: VerificationResult) -> None:
    """Add what `verify.min_token_agreement` and `verify.max_metric_loss` refuse to the failures."""
    least = least_agreement(config)
    below = {name: verification.identical[name] for name in GATED if verification.identical[name] < least}
    if below:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in verification.identical.items())
        verification.failures.append(
            f"sequences that are PyTorch's: {shares}; at least {least:.1%} must be, sampling aside"
        )
    for name, theirs in verification.metrics.get("pytorch", {}).items():
        ours = verification.metrics["ours"][name]
        if metrics.METRICS[name].loss(ours, theirs) > config.verify.max_metric_loss:
            verification.failures.append(
                f"{name} is {ours:.2f}%, PyTorch's {theirs:.2f}%; at most verify.max_metric_loss="
                f"{config.verify.max_metric_loss} points may be lost"
            )
    if verification.failures:
        verification.failures += [
            f"{each['case']}, {each['input'][:60]!r}: token {each['position']} is the first to differ"
            for each in verification.differing[:3]
        ]


def advice(config: Config) -> str:
    """What to try with a candidate that was refused."""
    if config.precision.dtype == "float32":
        return "FP32 must say what PyTorch says: this is a defect of an adapter or of a graph pass"
    tries = ["audit.texts=FILE with inputs like yours", "a larger audit.overflow_margin (more stays in FP32)"]
    if config.precision.plan != "rules":
        tries.append("precision=fp16-rules" if config.precision.plan == "minimized" else "precision=fp16")
    tries += [] if config.precision.dtype == "bfloat16" else ["precision=bf16 where the GPU has it"]
    return f"Try {', '.join(tries)}, or precision=fp32"


def routes(folder: Path) -> bool:
    """Whether the decoder in `folder` picks experts by the numbers it computes."""
    return any(node.op_type == "TopK" for node in files.load(folder / layout.DECODER).graph.all_nodes())


def emulated(bundle: Path, folder: Path, format: Format) -> Path:
    """The candidate with its graphs emulated (`accel.graph.emulate`), in `folder`, over the same weights."""
    for path in bundle.iterdir():
        if path.suffix != ".onnx":
            shutil.copyfile(path, folder / path.name)
    for path in bundle.glob("*.onnx"):
        model = files.load(path)
        emulate_half(model, format)
        files.save_graph(model, folder / path.name)
    return folder


def examine(
    folder: Path,
    config: Config,
    inputs: Mapping[str, Artifact],
    architecture: Architecture,
    verification: VerificationResult,
) -> None:
    """Fill in the verdict on the model in `folder`."""
    checkpoint, expected = inputs["checkpoint"].folder, inputs["reference"].folder
    own = torch_error.read_errors(inputs["torch_error"].folder)
    asked = texts.read_prompts(inputs["prompts"].folder / prompts.PROMPTS)
    with open_model(folder, config.runtime) as model:
        layers = len(architecture.signature(model.config, Component.DECODE).outputs) // 2
        verification.threshold = threshold(config.precision.dtype, layers)
        chosen, _ = reference.fixed_inputs(config, checkpoint, architecture, model.config, asked)
        if not compare_outputs(model, architecture, expected, own, verification):
            return  # nothing can be decoded
        rerouted = REROUTED if config.precision.dtype != "float32" and routes(folder) else 0.0
        if not compare_paths(model, architecture, expected, own, verification, rerouted):
            return
        tokens = json.loads((expected / reference.TOKENS).read_text())
        compare_tokens(model, checkpoint, config, chosen, tokens, verification)
        compare_references(model, checkpoint, config, tokens["references"], verification)
    judge(config, verification)
    verification.passed = not verification.failures


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes the candidate's files, `verdict.json` and the certificate. Raises `Refused` if it doesn't pass."""
    bundle, dtype = inputs["merge"].folder, config.precision.dtype
    native = config.runtime.compute_dtype.get(dtype) == dtype
    verification = VerificationResult(
        precision=dtype, execution="native" if native else "emulated", runtime=config.runtime.name
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tested = bundle if native else emulated(bundle, Path(scratch), FORMATS[dtype])
        examine(tested, config, inputs, architecture, verification)
    if not verification.passed:
        kept = "\n".join(list(dict.fromkeys(verification.failures))[:7])
        message = f"verify refuses the candidate ({dtype}, {verification.execution}):\n{kept}\n{advice(config)}"
        raise VerificationError(message, summarize(verification, inputs, None))
    for path in bundle.iterdir():  # copied: onnx refuses weights in a file with more than one hard link
        if path.name != MANIFEST:
            shutil.copyfile(path, out / path.name)
    (out / layout.VERDICT).write_text(json.dumps(asdict(verification), indent=1))
    measured = latency.beside_torch(out, config, inputs, architecture) if config.verify.latency else None
    explained = {}
    if "audit" in inputs:
        plans, (held, rows) = (
            audit.read_plans(inputs["audit"].folder),
            calibrate.read_statistics(inputs["calibrate"].folder),
        )
        explained = certificate.explain(plans, held, rows)
    certificate.write(out, asdict(verification), measured, explained, config, inputs)
    return summarize(verification, inputs, measured)


def summarize(
    verification: VerificationResult, inputs: Mapping[str, Artifact], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the manifest and a sweep's table say of a candidate."""
    mixes = inputs["convert"].summary.values()
    return {
        **{key: getattr(verification, key) for key in ("passed", "execution", "identical", "metrics")},
        "worst_logits": max(verification.drift.worst, default=None),
        "fp32_nodes": sum(mix["fp32_nodes"] for mix in mixes) if mixes else "all",
        "casts": sum(mix["casts"] for mix in mixes),
        "decoder_bytes": inputs["merge"].summary["merged_bytes"],
        "speed": measured,
    }


def taken(config: Config) -> tuple[str, ...]:
    mixed = ("calibrate", "audit") if config.precision.dtype != "float32" else ()
    return ("checkpoint", "prompts", "convert", "merge", "reference", "torch_error", *mixed)


STAGE = Stage(
    name="verify",
    run=run,
    inputs=taken,
    sections=("model", "precision", "runtime", "verify"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "sacrebleu"),
    files=reference_files,
)
