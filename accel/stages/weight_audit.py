"""Choose the format of every weight of 8 or 4 bits: by evidence on the model's own activations, then by trials.

The part of stage `audit` that runs where `precision.weight_bits` is set.

Reads:
    The checkpoint's config and tokenizer; `answers.json` of `answers`; `<component>.onnx` of `optimize` (FP32).

Writes:
    `weights.json`: the format of each weight that products read, or why it stays in FP32, with the errors and times of
    the candidates and the results of the trials.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.presets import TRIAL_LIMITS
from accel.config.schema import Config, PrecisionConfig
from accel.data.pretrained import end_tokens, load_config
from accel.errors import AccelError
from accel.evaluation import product_cost
from accel.evaluation.calibration_data import Batch, batches
from accel.evaluation.component_runner import signatures
from accel.evaluation.divergence import CONFIDENCE, least_tokens
from accel.evaluation.product_inputs import ProductInputs
from accel.evaluation.sensitivity import RecordedCall
from accel.evaluation.trial_calls import TEXT, counted_kind, record_calls
from accel.evaluation.weight_trials import WeightTrial, WeightTrialResult
from accel.graph import files
from accel.graph.precision.minimize import find_droppable
from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.formats import WeightFormat, formats
from accel.graph.quantization.plan import WeightChoice, WeightPlan
from accel.graph.quantization.products import ProductWeight, find_weights
from accel.graph.quantization.quantize_products import QuantizedWeights, matrix
from accel.pipeline.store import Artifact
from accel.runtime.session import SessionSettings
from accel.stages.answers import read_answers

logger = logging.getLogger(__name__)

PLAN = "weights.json"
BATCHES = 8  # calibration batches, half of them of texts; trials add more texts
TRIALS = "trials"  # reason why a weight stays in FP32, or in more bits than asked for
FALLBACK = BlockFormat(8, 32)  # of weights that trials don't allow 4 bits
# Of weights on CUDA whose rows are looked up as well: there, `GatherBlockQuantized` of ONNX Runtime 1.31 reads rows of
# 4 bits at wrong places (`after_gather_dim` in contrib_ops/cuda/quantization/gather_block_quantized.cc counts bytes).
LOOKED_UP = BlockFormat(8, 128)
LOOKED_UP_REASON = "its rows are looked up, which ONNX Runtime gets wrong in 4 bits on CUDA"


def candidates(precision: PrecisionConfig) -> dict[str, WeightFormat]:
    """Return the formats that `precision.weight_formats` names, by their names in plans.

    Raises:
        KeyError: No such format exists: see `accel.cli.validate`.
    """
    known = formats(precision.weight_bits or 8)
    return {known[name].name: known[name] for name in precision.weight_formats}


def product_weights(graphs: Path, components: Sequence[Component]) -> dict[str, ProductWeight]:
    """Return the weights that products of any component read, by name, each with whatever is in its way anywhere.

    Args:
        graphs: Folder of the FP32 graphs.
        components: The components.
    """
    weights: dict[str, ProductWeight] = {}
    obstacles: dict[str, str] = {}
    for component in components:
        for name, weight in find_weights(files.load(graphs / f"{component}.onnx")).items():
            if weight.products:
                weights.setdefault(name, weight)
            if weight.obstacle:
                obstacles.setdefault(name, weight.obstacle)
    for name, weight in weights.items():
        weight.obstacle = obstacles.get(name, "")
    return weights


def choose_formats(
    config: Config, weights: Mapping[str, ProductWeight], inputs: ProductInputs, settings: SessionSettings
) -> WeightPlan:
    """Choose a format for each weight by the error on recorded activations, and on a CPU by measured times.

    On a GPU a product of few rows takes as long as it takes to read its weight, so that the smallest format is the
    fastest, and activations keep the 16 bits that they have.

    Args:
        config: The configuration; its section `precision` is read.
        weights: Weights by name.
        inputs: Recorded activations.
        settings: Settings of the sessions that are timed.
    """
    named, on_cpu = candidates(config.precision), config.runtime.device == "cpu"
    plan = WeightPlan()
    times: dict[tuple[int, int], dict[str, float]] = {}
    for name, weight in progress.track(list(weights.items()), "weights"):
        choice = plan.weights[name] = WeightChoice(*weight.shape)
        if weight.obstacle:
            choice.keep(weight.obstacle)
            continue
        names = named
        if weight.lookups and not on_cpu and config.precision.weight_bits == 4:
            names, choice.reason = {LOOKED_UP.name: LOOKED_UP}, LOOKED_UP_REASON
        if on_cpu and weight.shape not in times:
            times[weight.shape] = product_cost.times(*weight.shape, names, settings)
        choice.microseconds = times.get(weight.shape, {})
        choice.errors = product_cost.relative_errors(matrix(weight), inputs.rows[name], names, round_rows=on_cpu)
        choice.choose(names)
    return plan


def breaches(precision: PrecisionConfig, result: WeightTrialResult) -> list[str]:
    """Describe the limits that a trial's tokens and outputs don't keep, on enough tokens; empty if it passed.

    Enough are those whose mean divergence is within the limit with `CONFIDENCE` standard errors added, and whose share
    of clear changes is, by its upper bound: the fewer they are, or the more they differ, the further below the limit
    they have to be. Where no token changes clearly, too few of them are no reason to fail.
    """
    measured = {
        "max_divergence": result.divergence + CONFIDENCE * result.standard_error,
        "max_token_changes": result.change_bound if result.clear_changes else 0.0,
        "max_output_error": result.error,
    }
    limits = {name: getattr(precision, name) / precision.strictness for name in TRIAL_LIMITS}
    exceeded = [name for name, value in measured.items() if not value <= limits[name]]
    return [f"{measured[name]:.2g} exceeds {name}={limits[name]:.2g}" for name in exceeded]


def apply_trials(config: Config, plan: WeightPlan, trial: WeightTrial) -> None:
    """Take weights back until a trial passes: in `plan` and in place, to FP32, or from 4 bits to 8.

    Weights with the smallest errors are tried first, so that those that trials take back are the worst. If a trial with
    all weights in 8 bits passes, those that don't get 4 bits have 8 in all trials of the search, else they are in FP32.

    Raises:
        AccelError: No trial passed within `audit.trials`.
    """
    precision, chosen = config.precision, plan.formats()
    known: dict[frozenset[tuple[str, WeightFormat]], bool] = {}  # the search asks for some sets again

    def passing(formats: Mapping[str, WeightFormat]) -> bool:
        key = frozenset(formats.items())
        if key not in known:
            result = trial(formats)
            exceeded = breaches(precision, result)
            known[key] = not exceeded
            plan.trials.append({"weights": len(formats), "passed": known[key], **asdict(result)})
            wider = sum(formats[name] != chosen[name] for name in formats)
            progress.note(
                f"trial {len(plan.trials)}: {len(formats)} of {len(chosen)} weights in low bits"
                + (f", {wider} of them in 8" if wider else "")
                + f", divergence {result.divergence:.2g} nats (standard error {result.standard_error:.1g}), "
                f"{result.changed} of {result.greedy_tokens} tokens changed, {result.clear_changes} clearly: "
                + (f"failed, {', '.join(exceeded)}" if exceeded else "passed")
            )
        return known[key]

    ranked, rest = sorted(chosen, key=plan.error), dict[str, WeightFormat]()
    if precision.weight_bits == 4 and not passing(chosen):
        wide: dict[str, WeightFormat] = dict.fromkeys(ranked, FALLBACK)
        rest = wide if passing(wide) else {}
    quantized = set(
        find_droppable(
            [[name] for name in ranked],
            lambda names: passing(rest | {name: chosen[name] for name in names}),
            config.audit.trials,
        )
    )
    if not quantized and chosen:
        raise AccelError(
            f"precision={precision.name}: no plan passed within audit.trials={config.audit.trials} trials; "
            f"{plan.describe_worst()}. Raise audit.trials or precision.max_divergence={precision.max_divergence}, or "
            "take precision=fp32"
        )
    for name in ranked:
        if name not in quantized:
            plan.weights[name].format = rest[name].name if name in rest else None
            plan.weights[name].reason = TRIALS


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `weights.json`. Return the formats of the weights and the results of the trials, for the certificate."""
    graphs = inputs["optimize"].folder
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        calls = _record(config, architecture, inputs, Path(scratch))
        sample = ProductInputs()
        for component, recorded in calls.items():
            sample.add(graphs / f"{component}.onnx", recorded, _settings(config, graphs))
        weights = product_weights(graphs, list(calls))
        plan = choose_formats(config, weights, sample, SessionSettings.of(config.runtime))
        if config.audit.trials:
            apply_trials(config, plan, _trial(config, architecture, calls, inputs))
            _warn_of_few_tokens(config.precision, plan)
    (out / PLAN).write_text(json.dumps(plan.dump(), indent=1))
    counts: dict[str, int] = {}
    for choice in plan.weights.values():
        key = choice.format or f"float32: {choice.reason}"
        counts[key] = counts.get(key, 0) + 1
    for key, count in counts.items():
        progress.note(f"{count} weights in {key}")
    return {"weights": counts, "trials": plan.trials}


def _warn_of_few_tokens(precision: PrecisionConfig, plan: WeightPlan) -> None:
    """Log a warning if the trials had too few tokens of greedy search to show that the share of changes is small."""
    tokens, needed = plan.trials[-1]["greedy_tokens"], least_tokens(precision.max_token_changes)
    if tokens < needed:
        logger.warning(
            f"trials compared {tokens} tokens of greedy search; {needed} are needed to show that at most "
            f"precision.max_token_changes={precision.max_token_changes} of them change: name more texts (audit.texts)"
        )


def _record(
    config: Config, architecture: Architecture, inputs: Mapping[str, Artifact], scratch: Path
) -> Mapping[Component, Sequence[RecordedCall]]:
    """Run the FP32 graphs and record calls of each component in `scratch`.

    The calls are those of the first `BATCHES` batches, and for trials of more texts until there are enough tokens.
    """
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    hf_config = load_config(checkpoint)
    prompts = read_answers(inputs["answers"].folder)
    work = list(islice(batches(config, architecture, hf_config, checkpoint, prompts), BATCHES))
    kind = counted_kind([batch.kind for batch in work])
    same_kind = replace(config, audit=replace(config.audit, random=kind != TEXT))
    supply = batches(same_kind, architecture, hf_config, checkpoint, prompts)
    more: Iterable[Batch] = islice(supply, sum(batch.kind == kind for batch in work), None)
    return record_calls(
        signatures(architecture, hf_config),
        work,
        iter(more if config.audit.trials else ()),
        graphs,
        _settings(config, graphs),
        scratch,
        end_tokens(checkpoint),
        config.audit.max_batches,
        least_tokens(config.precision.max_token_changes),
    ).calls


def _settings(config: Config, graphs: Path) -> SessionSettings:
    """Return the settings of sessions whose weights are in folder `graphs`.

    They are not those of `accel.stages.calibrate.low_memory_settings`: hundreds of decode steps run here, each nine
    times as fast with packed weights and folded transposes, and `MatMulNBits` without packed weights is slower still.
    """
    return SessionSettings.of(
        config.runtime, session={"session.model_external_initializers_file_folder_path": str(graphs)}
    )


def _trial(
    config: Config,
    architecture: Architecture,
    calls: Mapping[Component, Sequence[RecordedCall]],
    inputs: Mapping[str, Artifact],
) -> WeightTrial:
    """Return the trial that compares quantized graphs with recorded calls of the FP32 graphs."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    caches = {spec.name for spec in architecture.signature(load_config(checkpoint), Component.DECODE).outputs}
    return WeightTrial(
        graphs,
        calls,
        _settings(config, graphs),
        QuantizedWeights(),
        caches,
        end_tokens(checkpoint),
        config.precision.max_divergence / config.precision.strictness,
    )


def read_plan(folder: Path) -> WeightPlan:
    """Return the plan in the `weights.json` of `folder`."""
    return WeightPlan.parse(json.loads((folder / PLAN).read_text()))
