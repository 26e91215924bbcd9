"""Record calibration statistics: the magnitudes of every float value of the FP32 graphs, over random ids and texts.

Reads:
    The checkpoint's config and tokenizer; `answers.json` of `answers`; `<component>.onnx` of `optimize` (FP32); the
    texts that `audit.texts` or `model.references` names.

Writes:
    `statistics.json`: for each component the statistics of each value, the inputs of each batch, and why no more
    batches were run.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from os.path import isabs
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, RuntimeConfig
from accel.data import texts
from accel.data.pretrained import load_config
from accel.errors import AccelError
from accel.evaluation.calibration_data import Batch, Call, batches, run_batches
from accel.evaluation.component_runner import signatures
from accel.graph import files
from accel.graph.precision import observer, plan
from accel.graph.precision.formats import FP16
from accel.graph.weights import tensor_content
from accel.pipeline.stage import SESSION, Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.session import HostSession, SessionSettings
from accel.stages.answers import read_answers
from accel.system.host_memory import release

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"
NAMES_SHOWN = 5  # values named in a warning
ComponentStatistics = dict[str, observer.ValueStatistics]
"""Value name -> statistics, of one component's graph."""


class ObservedGraph:
    """A component's FP32 graph with observers inserted.

    Attributes:
        statistics: Statistics of every float value, over all batches run so far.
    """

    def __init__(self, source: Path) -> None:
        model = files.load(source)
        plan.clamp_masks(model)
        self.names = observer.insert_observers(model)
        self.rows = observer.batch_first_values(model)
        self.statistics: ComponentStatistics = {name: observer.ValueStatistics() for name in self.names}
        self.graph, self.folder = files.dump(model), source.parent
        del model
        release()

    def open(self, runtime: RuntimeConfig) -> Call:
        """Open a session. Each call of the returned function adds to `statistics`."""
        session = HostSession(self.graph, low_memory_settings(runtime, self.folder))

        def call(number: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = session(inputs)
            columns = [outputs.pop(name).numpy() for name in observer.OUTPUTS]
            batch_size = len(inputs[session.inputs[0]])
            observed = observer.read_observers(self.names, columns, self.rows, (number, batch_size))
            for name, seen in observed.items():
                self.statistics[name].widen(seen)
            return outputs

        return call


def low_memory_settings(runtime: RuntimeConfig, weights: Path) -> SessionSettings:
    """Return settings for a session that runs only a few times: little memory, no graph optimisation.

    Weights stay in the memory-mapped file in folder `weights`, and freed memory is not kept for the next run.
    """
    keys = {"session.disable_prepacking": "1", "session.model_external_initializers_file_folder_path": str(weights)}
    return SessionSettings.of(runtime, session=keys, arena=False, fuse=False)


def unsettled(
    statistics: Mapping[Component, ComponentStatistics], overflow_margin: float
) -> list[tuple[Component, str]]:
    """Return the values whose magnitude still grows towards FP16's limit.

    A value counts if it is within the limit, overflow margin included, but would exceed it by growing once more by the
    factor of the newest batches.
    """
    growing = []
    for component, values in statistics.items():
        for name, seen in values.items():
            with_margin = seen.largest * overflow_margin
            if with_margin <= FP16.largest < with_margin * seen.growth():
                growing.append((component, name))
    return growing


def observe(
    config: Config,
    architecture: Architecture,
    checkpoint: Path,
    graphs: Path,
    prompts: Sequence[texts.Prompt],
    scratch: Path,
) -> tuple[dict[Component, ComponentStatistics], list[Batch], str]:
    """Run calibration batches through the observed graphs, and double their number until the statistics settle.

    Growth over the second half of the first `audit.batches` is the first that counts. Sessions stay open over both.

    Args:
        config: The configuration.
        architecture: The adapter of the model.
        checkpoint: Folder of the checkpoint.
        graphs: Folder of the optimised FP32 graphs.
        prompts: Inputs where neither `audit.texts` nor `model.references` is given.
        scratch: Folder for tensors that pass between components.

    Returns:
        The statistics of every component, the batches they were taken over, and why no more batches were run.
    """
    audit = config.audit
    hf_config = load_config(checkpoint)
    specs = signatures(architecture, hf_config)
    supply = batches(config, architecture, hf_config, checkpoint, prompts)
    observed = {component: ObservedGraph(graphs / f"{component}.onnx") for component in specs}
    statistics = {component: graph.statistics for component, graph in observed.items()}
    used: list[Batch] = []
    growing: list[tuple[Component, str]] = []
    counts = _batch_counts(audit.batches, audit.max_batches)

    def mark(component: Component, number: int) -> None:
        if number in counts:
            for seen in statistics[component].values():
                seen.mark(number)

    for count in counts[counts.index(audit.batches) :]:
        work = list(islice(supply, count - len(used)))
        if not work:
            return statistics, used, f"all {len(used)} batches were used"
        run_batches(specs, work, lambda each: observed[each].open(config.runtime), scratch, len(used), finished=mark)
        used += work
        growing = unsettled(statistics, audit.overflow_margin)
        if len(used) == count and not growing:
            return statistics, used, f"settled after {len(used)} batches"
    names = ", ".join(f"{component} {name}" for component, name in growing[:NAMES_SHOWN])
    more = ", …" if len(growing) > NAMES_SHOWN else ""
    logger.warning(
        f"calibration stopped at audit.max_batches={audit.max_batches} batches, while the magnitudes of "
        f"{len(growing)} values still grow towards FP16's limit: {names}{more}. "
        "Raise audit.max_batches or audit.overflow_margin"
    )
    return statistics, used, f"audit.max_batches={audit.max_batches} reached, {len(growing)} values still grow"


def _batch_counts(first: int, maximum: int) -> list[int]:
    """Return the numbers of batches between which growth is measured: half of `first`, `first`, then doubling."""
    counts = [max(1, first // 2), first] if first > 1 else [first]
    while counts[-1] * 2 <= maximum:
        counts.append(counts[-1] * 2)
    return counts


def check_finite(statistics: Mapping[Component, ComponentStatistics], load: Callable[[Component], ir.Model]) -> None:
    """Check that the FP32 graphs' outputs are finite.

    Args:
        statistics: Calibration statistics of every component.
        load: Returns a component's FP32 graph.

    Raises:
        AccelError: An output was NaN or infinite. The message names the node, weight or input where that begins.
    """
    for component, values in statistics.items():
        model = load(component)
        for output in model.graph.outputs:
            seen = values.get(output.name or "")
            if seen is not None and seen.not_finite:
                raise AccelError(
                    f"{component}: output {output.name} is NaN or infinite in FP32 already, beginning at "
                    f"{_origin(output, values)}. Check the checkpoint's weights and the inputs: no choice of precision "
                    "can mend this"
                )


def _origin(value: ir.Value, values: ComponentStatistics) -> str:
    """Describe where non-finite numbers begin, following the non-finite inputs upwards from `value`."""
    producer = value.producer()
    while producer is not None:
        not_finite = [operand for operand in producer.inputs if operand is not None and _not_finite(operand, values)]
        if not not_finite:
            return f"the {producer.op_type} node with output {value.name}"
        value = not_finite[0]
        producer = value.producer()
    return f"the {'weight' if value.is_initializer() else 'input'} {value.name}"


def _not_finite(value: ir.Value, values: ComponentStatistics) -> bool:
    """Return whether a weight holds, or a computed value was seen to hold, NaN or infinity."""
    if value.const_value is not None:
        elements = tensor_content(value.const_value)
        return elements.dtype.kind == "f" and not bool(np.isfinite(elements).all())
    seen = values.get(value.name or "")
    return seen is not None and seen.not_finite > 0


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `statistics.json`. Return the number of batches, and why no more were run."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    prompts = read_answers(inputs["answers"].folder)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        statistics, used, stopped = observe(config, architecture, checkpoint, graphs, prompts, Path(scratch))
    progress.note(f"calibration statistics: {stopped}")
    check_finite(statistics, lambda component: files.load(graphs / f"{component}.onnx"))
    components = {}
    for component, values in statistics.items():
        components[component] = {name: asdict(seen) for name, seen in values.items()}
    record = {"stopped": stopped, "batches": [list(batch.rows) for batch in used], "components": components}
    (out / STATISTICS).write_text(json.dumps(record))
    return {"batches": len(used), "stopped": stopped}


def read_statistics(folder: Path) -> tuple[dict[Component, ComponentStatistics], list[list[str]]]:
    """Read the `statistics.json` in `folder`.

    Returns:
        The statistics of every component, and a description of each row of each batch.
    """
    record = json.loads((folder / STATISTICS).read_text())
    statistics = {}
    for component, values in record["components"].items():
        statistics[Component(component)] = {name: observer.ValueStatistics(**seen) for name, seen in values.items()}
    return statistics, record["batches"]


def text_files(config: Config) -> tuple[str, ...]:
    """Return the text files outside the checkpoint's folder whose content counts for the key."""
    paths = []
    if config.audit.texts is not None:
        paths.append(config.audit.texts)
    references = config.model.references  # relative to the checkpoint's folder, unless absolute
    if references is not None and isabs(references):
        paths.append(references)
    return tuple(paths)


STAGE = Stage(
    name="calibrate",
    run=run,
    inputs=takes("checkpoint", "answers", "optimize"),
    sections=(
        "audit.batches",
        "audit.max_batches",
        "audit.batch_size",
        "audit.max_length",
        "audit.seed",
        "audit.random",
        "audit.texts",
        "audit.column",
        "audit.overflow_margin",
        "model.references",
        *SESSION,
    ),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    files=text_files,
)
