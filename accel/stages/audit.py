"""Choose the nodes that stay in FP32, by rules over calibration statistics and then by sensitivity trials.

Reads:
    The checkpoint's config and tokenizer; `answers.json` of `answers`; `<component>.onnx` of `optimize` (FP32); the
    statistics that `calibrate` recorded.

Writes:
    `plan.json`: for each component the nodes, weights, inputs and outputs kept in FP32, each with its reason. Where
    weights have fewer than 16 bits, `weights.json` instead: see `accel.stages.weight_audit`.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config
from accel.data import texts
from accel.data.pretrained import load_config
from accel.errors import unknown
from accel.evaluation.calibration_data import batches, run_batches
from accel.evaluation.component_runner import signatures
from accel.evaluation.sensitivity import Recorder, SensitivityTrial
from accel.graph import files
from accel.graph.precision import baselines, minimize, observer, plan
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS, FP16, Format
from accel.pipeline.stage import SESSION, Stage
from accel.pipeline.store import Artifact
from accel.stages import weight_audit
from accel.stages.answers import read_answers
from accel.stages.calibrate import ComponentStatistics, low_memory_settings, read_statistics, text_files

PLAN = "plan.json"
TRIAL_BATCHES = 4  # calibration batches that trials run on
LARGEST_SHOWN = 5  # values named in the report
MASK_TOLERANCE = 0.05  # relative: a magnitude this close to the clamped mask constant is a mask, not an activation
MINIMIZED, BY_RULES, BY_OPERATORS, BLANKET = "minimized", "rules", "operators", "blanket"
RULES: dict[str, str] = {
    MINIMIZED: "rules over calibration statistics, without the nodes that trials show to be safe in 16 bits",
    BY_RULES: "rules over calibration statistics alone",
    BY_OPERATORS: "a baseline: the listed operators stay in FP32",
    BLANKET: "a baseline: everything that can be lowered is lowered",
}


def target_format(config: Config) -> Format:
    """Return the 16-bit format that graphs are lowered to.

    With `precision.dtype=float32` nothing is lowered, and the plan shows what FP16 would take.
    """
    return FP16 if config.precision.dtype == "float32" else FORMATS[config.precision.dtype]


def load_graph(graphs: Path, component: Component, format: Format) -> ir.Model:
    """Load a component's FP32 graph from folder `graphs`, with types inferred and masks clamped to `format`."""
    model = files.load(graphs / f"{component}.onnx")
    observer.infer_types(model)
    plan.clamp_masks(model, format)
    return model


def initial_plans(
    config: Config, models: Mapping[Component, ir.Model], statistics: Mapping[Component, ComponentStatistics]
) -> dict[Component, plan.Plan]:
    """Make the plan of every component by the rule that `precision.plan` names, before any trial.

    Raises:
        AccelError: No such rule exists.
    """
    format, rule = target_format(config), config.precision.plan
    plans: dict[Component, plan.Plan] = {}
    for component, model in models.items():
        if rule in (MINIMIZED, BY_RULES):
            plans[component] = plan.make_plan(model, statistics[component], config.audit.overflow_margin, format)
        elif rule == BY_OPERATORS:
            plans[component] = baselines.by_operators(model, config.precision.operators, format)
        elif rule == BLANKET:
            plans[component] = plan.least_plan(model, format)
        else:
            raise unknown("precision.plan", rule, RULES)
    return plans


def minimize_plans(
    config: Config,
    architecture: Architecture,
    checkpoint: Path,
    graphs: Path,
    plans: Mapping[Component, plan.Plan],
    statistics: Mapping[Component, ComponentStatistics],
    prompts: Sequence[texts.Prompt],
    scratch: Path,
) -> dict[Component, plan.Plan]:
    """Drop from every plan the nodes that trials show to be safe in 16 bits.

    Each component is tried by itself, on inputs computed by the FP32 graphs.

    Args:
        config: The configuration.
        architecture: The adapter of the model.
        checkpoint: Folder of the checkpoint.
        graphs: Folder of the optimised FP32 graphs.
        plans: Plans made by the rules.
        statistics: Calibration statistics of every component.
        prompts: Inputs where neither `audit.texts` nor `model.references` is given.
        scratch: Folder for recorded calls; its content may be deleted afterwards.

    Returns:
        The smaller plans, one a component.
    """
    format = target_format(config)
    groups: dict[Component, list[list[str]]] = {}
    for component, rule_plan in plans.items():
        groups[component] = minimize.droppable_groups(load_graph(graphs, component, format), rule_plan)
    if config.audit.trials == 0 or not any(groups.values()):
        return dict(plans)
    hf_config = load_config(checkpoint)
    specs = signatures(architecture, hf_config)
    self_caches = {spec.name for spec in specs[Component.DECODE].outputs}
    work = list(islice(batches(config, architecture, hf_config, checkpoint, prompts), TRIAL_BATCHES))
    recorder = Recorder(scratch, [batch.kind for batch in work])
    settings = low_memory_settings(config.runtime, graphs)
    run_batches(
        specs, work, lambda component: recorder.open(component, graphs / f"{component}.onnx", settings), scratch
    )
    smaller_plans = dict(plans)
    for component, rule_plan in progress.track(list(plans.items()), "trials"):
        if not groups[component]:
            continue
        trial = SensitivityTrial(
            component,
            graphs / f"{component}.onnx",
            recorder.calls[component],
            settings,
            format,
            config.audit.overflow_margin,
            statistics[component],
            self_caches,
        )
        model = load_graph(graphs, component, format)
        smaller_plans[component] = _minimize_plan(model, rule_plan, groups[component], trial, config.audit.trials)
    return smaller_plans


def _minimize_plan(
    model: ir.Model, rule_plan: plan.Plan, groups: list[list[str]], trial: SensitivityTrial, max_trials: int
) -> plan.Plan:
    """Return `rule_plan` without the groups of nodes whose lowering keeps the outputs within tolerance."""
    baseline = trial(rule_plan)
    if not baseline.finite:
        return rule_plan  # its outputs aren't finite here, so there is nothing to compare a smaller plan with

    def passes(names: list[str]) -> bool:
        return trial(minimize.drop_nodes(model, rule_plan, names), baseline.changed).within(baseline)

    return minimize.drop_nodes(model, rule_plan, minimize.find_droppable(groups, passes, max_trials))


def unify_decoder_plans(
    plans: Mapping[Component, plan.Plan],
    models: Mapping[Component, ir.Model],
    architecture: Architecture,
    checkpoint: Path,
) -> None:
    """Extend the decoders' plans in place, so that each weight and cache has one type in all of their graphs."""
    decoders = [component for component in models if component is not Component.ENCODER]
    cache = architecture.signature(load_config(checkpoint), Component.DECODE).cache
    plan.unite(
        {component: plans[component] for component in decoders},
        {component: models[component] for component in decoders},
        cache,
    )


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `plan.json`, `weights.json` or both. Return what they say of nodes in FP32 and of weights in low bits."""
    low_bits = config.precision.weight_bits is not None
    found = weight_audit.run(config, inputs, architecture, out) if low_bits else {}
    return {**found, **_plan_nodes(config, inputs, architecture, out)} if _plans_nodes(config) else found


def _plans_nodes(config: Config) -> bool:
    """Return whether nodes have to be chosen that stay in FP32: unless all do, and weights alone are lowered."""
    return config.precision.weight_bits is None or config.precision.dtype != "float32"


def _plan_nodes(
    config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path
) -> Mapping[str, Any]:
    """Write `plan.json`. Return the mix of precisions after each phase, and the nodes kept by each rule."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    statistics, rows = read_statistics(inputs["calibrate"].folder)
    format = target_format(config)
    models = {component: load_graph(graphs, component, format) for component in architecture.components()}
    plans = initial_plans(config, models, statistics)
    unify_decoder_plans(plans, models, architecture, checkpoint)
    sizes = {"by the rule": precision_shares(graphs, plans, format)}
    if config.precision.plan == MINIMIZED:
        prompts = read_answers(inputs["answers"].folder)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            plans = minimize_plans(config, architecture, checkpoint, graphs, plans, statistics, prompts, Path(scratch))
        unify_decoder_plans(plans, models, architecture, checkpoint)
        sizes["after trials"] = precision_shares(graphs, plans, format)
        for component, model in models.items():
            plans[component].nodes.update(minimize.minimize_casts(model, plans[component]))
        sizes["with the fewest casts"] = precision_shares(graphs, plans, format)
    record = {component: final_plan.dump() for component, final_plan in plans.items()}
    (out / PLAN).write_text(json.dumps(record, indent=1))
    return {
        "format": format.name,
        "plan": config.precision.plan,
        "sizes": sizes,
        "rules": _count_rules(plans),
        "largest_values": largest_values(statistics, rows),
    }


def largest_values(
    statistics: Mapping[Component, ComponentStatistics], rows: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the values of the largest finite magnitude, masks excluded, and the input that each was seen with.

    Args:
        statistics: Calibration statistics of every component.
        rows: Description of each row of each calibration batch.

    Returns:
        At most `LARGEST_SHOWN` entries, largest first, as JSON.
    """
    finite = []
    for component, values in statistics.items():
        for name, seen in values.items():
            is_mask = abs(seen.largest / -FP16.mask_value - 1) <= MASK_TOLERANCE
            if not seen.not_finite and not is_mask:
                finite.append((seen, component, name))
    finite.sort(key=lambda entry: -entry[0].largest)
    return [
        {"component": component, "value": name, "largest": seen.largest, "seen_with": seen.seen_with(rows)}
        for seen, component, name in finite[:LARGEST_SHOWN]
    ]


def precision_shares(graphs: Path, plans: Mapping[Component, plan.Plan], format: Format) -> dict[str, dict[str, float]]:
    """Return, for each component, the mix of precisions that its plan leads to (see `half_share`)."""
    shares = {}
    for component, chosen in plans.items():
        model = files.load(graphs / f"{component}.onnx")
        convert_half(model, chosen, format)
        shares[str(component)] = half_share(model)
    return shares


def _count_rules(plans: Mapping[Component, plan.Plan]) -> dict[str, dict[str, int]]:
    """Return, for each component and rule, the number of nodes that the rule keeps in FP32."""
    counts: dict[str, dict[str, int]] = {}
    for component, chosen in plans.items():
        by_rule = counts[str(component)] = {}
        for reason in chosen.nodes.values():
            by_rule[reason.rule] = by_rule.get(reason.rule, 0) + 1
    return counts


def read_plans(folder: Path) -> dict[Component, plan.Plan]:
    """Return the plan of every component from the `plan.json` in `folder`."""
    record = json.loads((folder / PLAN).read_text())
    return {Component(component): plan.Plan.parse(values) for component, values in record.items()}


def _inputs(config: Config) -> tuple[str, ...]:
    statistics = ("calibrate",) if _plans_nodes(config) else ()
    return ("checkpoint", "answers", "optimize", *statistics)


STAGE = Stage(
    name="audit",
    run=run,
    inputs=_inputs,
    sections=("audit", "precision", "model.references", *SESSION),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "networkx"),
    files=text_files,
)
