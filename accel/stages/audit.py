"""Decides what stays in FP32 and why: by rules on what every value held, then as little of it as trials allow."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config
from accel.data import texts
from accel.evaluation.calibration_data import batches, walk
from accel.evaluation.component_runner import signatures
from accel.evaluation.sensitivity import Recorder, SensitivityTrial
from accel.graph import files
from accel.graph.precision import baselines, minimize, observer, plan
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS, FP16, Format
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.stages import prompts
from accel.stages.calibrate import ComponentStatistics, lean, read_statistics, text_files

PLAN = "plan.json"
TRIED_ON = 4  # batches
NEAREST = 5  # values named in the report
MASKED = 0.05  # as near to the number that masks are clamped to: a mask, and what was added to it
MINIMIZED, BY_RULES = "minimized", "rules"
RULES: dict[str, str] = {
    MINIMIZED: "by what values held, less what trials show to be safe",
    BY_RULES: "by what values held",
    "operators": "by a list of operators, to compare with",
    "blanket": "nothing that can be lowered, to compare with",
}


def target(config: Config) -> Format:
    """The format that graphs are lowered to; FP16 where they are not: the plan then says what it would take."""
    return FP16 if config.precision.dtype == "float32" else FORMATS[config.precision.dtype]


def load(graphs: Path, component: Component, format: Format) -> ir.Model:
    """A role's FP32 graph as plans are made for it: typed, its masks clamped."""
    model = files.load(graphs / f"{component}.onnx")
    observer.infer_types(model)
    plan.clamp_masks(model, format)
    return model


def first_plans(
    config: Config, models: Mapping[Component, ir.Model], statistics: Mapping[Component, ComponentStatistics]
) -> dict[Component, plan.Plan]:
    """What the chosen rule keeps, before anything is tried."""
    format = target(config)
    rules: dict[str, Callable[[Component, ir.Model], plan.Plan]] = {
        MINIMIZED: lambda component, model: plan.make_plan(
            model, statistics[component], config.audit.overflow_margin, format
        ),
        BY_RULES: lambda component, model: plan.make_plan(
            model, statistics[component], config.audit.overflow_margin, format
        ),
        "operators": lambda component, model: baselines.by_operators(model, config.precision.operators, format),
        "blanket": lambda component, model: plan.least_plan(model, format),
    }
    return {component: rules[config.precision.plan](component, model) for component, model in models.items()}


def smaller(
    config: Config,
    architecture: Architecture,
    checkpoint: Path,
    graphs: Path,
    plans: Mapping[Component, plan.Plan],
    statistics: Mapping[Component, ComponentStatistics],
    asked: Sequence[texts.Prompt],
    scratch: Path,
) -> dict[Component, plan.Plan]:
    """The plans without what trials show to be safe in 16 bits, every role by itself, fed what FP32 graphs give."""
    format = target(config)
    open_groups = {
        component: minimize.groups(load(graphs, component, format), found) for component, found in plans.items()
    }
    if config.audit.trials == 0 or not any(open_groups.values()):
        return dict(plans)
    description = AutoConfig.from_pretrained(checkpoint)
    specs = signatures(architecture, description)
    growing = {spec.name for spec in specs[Component.DECODE].outputs}
    work = list(islice(batches(config, architecture, description, checkpoint, asked), TRIED_ON))
    recorder, settings = Recorder(scratch, [batch.kind for batch in work]), lean(config.runtime, graphs)
    walk(specs, work, lambda component: recorder.open(component, graphs / f"{component}.onnx", settings), scratch)
    found = dict(plans)
    for component, given in progress.track(list(plans.items()), "trials"):
        model, path = load(graphs, component, format), graphs / f"{component}.onnx"
        trial = SensitivityTrial(
            component,
            path,
            recorder.calls[component],
            settings,
            format,
            config.audit.overflow_margin,
            statistics[component],
            growing,
        )
        if open_groups[component]:
            found[component] = _minimized(model, given, open_groups[component], trial, config.audit.trials)
    return found


def _minimized(
    model: ir.Model, given: plan.Plan, groups: list[list[str]], trial: SensitivityTrial, trials: int
) -> plan.Plan:
    known = trial(given)
    if not known.finite:
        return given  # not even the rules' plan computes here: nothing to hold a smaller one to

    def passes(names: list[str]) -> bool:
        return trial(minimize.without(model, given, names), known.changed).within(known)

    return minimize.without(model, given, minimize.droppable(groups, passes, trials))


def agree(
    plans: Mapping[Component, plan.Plan],
    models: Mapping[Component, ir.Model],
    architecture: Architecture,
    checkpoint: Path,
) -> None:
    """In place: one type for every weight and cache of the decoders' graphs."""
    decoders = [component for component in models if component is not Component.ENCODER]
    cache = architecture.signature(AutoConfig.from_pretrained(checkpoint), Component.DECODE).cache
    plan.unite(
        {component: plans[component] for component in decoders},
        {component: models[component] for component in decoders},
        cache,
    )


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `plan.json`: for each role the nodes, weights and ports kept in FP32, each with its reason and numbers."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    statistics, rows = read_statistics(inputs["calibrate"].folder)
    format = target(config)
    models = {component: load(graphs, component, format) for component in architecture.components()}
    plans = first_plans(config, models, statistics)
    agree(plans, models, architecture, checkpoint)
    sizes = {"by the rule": sizes_of(graphs, plans, format)}
    if config.precision.plan == MINIMIZED:
        asked = texts.read_prompts(inputs["prompts"].folder / prompts.PROMPTS)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            plans = smaller(config, architecture, checkpoint, graphs, plans, statistics, asked, Path(scratch))
        agree(plans, models, architecture, checkpoint)
        sizes["after trials"] = sizes_of(graphs, plans, format)
        for component, model in models.items():
            plans[component].nodes.update(minimize.minimize_casts(model, plans[component]))
        sizes["with the fewest casts"] = sizes_of(graphs, plans, format)
    (out / PLAN).write_text(json.dumps({component: found.dump() for component, found in plans.items()}, indent=1))
    return {
        "format": format.name,
        "plan": config.precision.plan,
        "sizes": sizes,
        "rules": _rules(plans),
        "nearest": nearest(statistics, rows),
    }


def nearest(statistics: Mapping[Component, ComponentStatistics], rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The values of the largest magnitude that FP32 holds, masks aside, and the input each was seen with."""
    finite = [
        (held, component, name)
        for component, values in statistics.items()
        for name, held in values.items()
        if not held.not_finite and abs(held.largest / -FP16.mask - 1) > MASKED
    ]
    finite.sort(key=lambda found: -found[0].largest)
    return [
        {"role": component, "value": name, "largest": held.largest, "seen_with": held.seen_with(rows)}
        for held, component, name in finite[:NEAREST]
    ]


def sizes_of(graphs: Path, plans: Mapping[Component, plan.Plan], format: Format) -> dict[str, dict[str, float]]:
    """Role -> what the mix would be made of: see `half_share`."""
    found = {}
    for component, chosen in plans.items():
        model = files.load(graphs / f"{component}.onnx")
        convert_half(model, chosen, format)
        found[str(component)] = half_share(model)
    return found


def _rules(plans: Mapping[Component, plan.Plan]) -> dict[str, dict[str, int]]:
    """Role -> rule -> nodes that it keeps."""
    found: dict[str, dict[str, int]] = {}
    for component, chosen in plans.items():
        counts = found[str(component)] = {}
        for reason in chosen.nodes.values():
            counts[reason.rule] = counts.get(reason.rule, 0) + 1
    return found


def read_plans(folder: Path) -> dict[Component, plan.Plan]:
    """Role -> plan, as `run` wrote them."""
    return {
        Component(component): plan.Plan.parse(values)
        for component, values in json.loads((folder / PLAN).read_text()).items()
    }


STAGE = Stage(
    name="audit",
    run=run,
    inputs=takes("checkpoint", "prompts", "optimize", "calibrate"),
    sections=("audit", "precision", "model.references", "runtime"),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "networkx"),
    files=text_files,
)
