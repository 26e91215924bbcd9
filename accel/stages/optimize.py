"""Remove nodes and memory from the exported graphs; the numbers stay the same.

Reads the graphs of `export`. Writes `<component>.onnx` for every component, and reports what each pass changed. Prefill
refers to the weights of decode, where it did so before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config
from accel.errors import unknown
from accel.graph import files
from accel.graph.passes import run_pass
from accel.graph.registry import OPTIMIZE
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact


def check(passes: Mapping[str, bool]) -> None:
    """Raise `AccelError` if `passes` names a pass that doesn't exist."""
    for name in passes:
        if name not in OPTIMIZE:
            raise unknown("optimize.passes", name, OPTIMIZE)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Run the passes over each group of graphs that share weights.

    Returns:
        `nodes`: number of nodes by component, at first and after each pass that changed any graph. `descriptions`:
        what each of these passes does.
    """
    components = architecture.components()
    models = {component: files.load(inputs["export"].folder / f"{component}.onnx") for component in components}
    groups = [[models[Component.ENCODER]]] if Component.ENCODER in models else []
    groups.append([model for component, model in models.items() if component is not Component.ENCODER])

    def count() -> dict[str, int]:
        return {str(component): files.node_count(model) for component, model in models.items()}

    nodes, descriptions = {"exported": count()}, {"exported": ""}
    for name, graph_pass in progress.track(list(OPTIMIZE.items()), "passes"):
        if config.optimize.passes.get(name, True):
            modified = [run_pass(graph_pass(), group) for group in groups]
            if any(modified):
                nodes[name], descriptions[name] = count(), graph_pass.description
    for component, model in progress.track(list(models.items()), "writing"):
        if component is not Component.PREFILL:
            files.save(model, out / f"{component}.onnx")
    prefill, decode = (out / f"{component}.onnx" for component in (Component.PREFILL, Component.DECODE))
    files.save_sharing(models[Component.PREFILL], prefill, models[Component.DECODE], decode)
    left = count()
    for name, exported in nodes["exported"].items():
        progress.note(f"{name}: {exported} nodes exported, {left[name]} left")
    return {"nodes": nodes, "descriptions": descriptions}


STAGE = Stage(
    name="optimize",
    run=run,
    inputs=takes("export"),
    sections=("optimize",),
    packages=("onnx", "onnx-ir", "onnxscript"),
)
