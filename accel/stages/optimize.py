"""Graph passes that cost nothing: fewer nodes and less memory, the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config
from accel.errors import unknown
from accel.graph import files
from accel.graph.cleanup.direct_lengths import direct_lengths
from accel.graph.cleanup.eliminate_expand import eliminate_expand
from accel.graph.cleanup.eliminate_identity_gather_nd import eliminate_identity_gather_nd
from accel.graph.cleanup.eliminate_noop_add import eliminate_noop_add
from accel.graph.cleanup.fold_constants import fold_constants, merge_duplicates, simplify, strip_metadata
from accel.graph.cleanup.fold_transposes import fold_transposes
from accel.graph.cleanup.infer_shapes import infer_shapes
from accel.graph.cleanup.precompute_position_bias import precompute_position_bias
from accel.graph.cleanup.shift_ranges import shift_ranges
from accel.graph.cleanup.static_reshapes import static_reshapes
from accel.graph.cleanup.unstack_expert_weights import unstack_expert_weights
from accel.graph.fusion.fuse_norms import fuse_norms
from accel.graph.fusion.fuse_skip_norm import fuse_skip_norm
from accel.graph.fusion.hoist_additions import hoist_additions
from accel.graph.fusion.pack_qkv import pack_qkv
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact

# In the order in which they run. A pass takes all graphs that share weights, and changes a weight in all or in none.
PASSES: dict[str, Callable[[Sequence[ir.Model]], None]] = {
    "strip_metadata": strip_metadata,
    "fold_constants": fold_constants,
    "simplify": simplify,
    "infer_shapes": infer_shapes,
    "static_reshapes": static_reshapes,
    "eliminate_identity_gather_nd": eliminate_identity_gather_nd,
    "eliminate_expand": eliminate_expand,
    "eliminate_noop_add": eliminate_noop_add,
    "shift_ranges": shift_ranges,
    "direct_lengths": direct_lengths,
    "merge_duplicates": merge_duplicates,
    "precompute_position_bias": precompute_position_bias,
    "unstack_expert_weights": unstack_expert_weights,
    "fold_transposes": fold_transposes,
    "fuse_norms": fuse_norms,
    "fuse_skip_norm": fuse_skip_norm,
    "pack_qkv": pack_qkv,
    "hoist_additions": hoist_additions,
}


def check(passes: Mapping[str, bool]) -> None:
    """Raises `AccelError` on a pass that doesn't exist."""
    for name in passes:
        if name not in PASSES:
            raise unknown("optimize.passes", name, PASSES)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` for every role, and reports the nodes before and after each pass."""
    components = architecture.components()
    models = {component: files.load(inputs["export"].folder / f"{component}.onnx") for component in components}
    groups = [[models[Component.ENCODER]]] if Component.ENCODER in models else []
    groups.append([model for component, model in models.items() if component is not Component.ENCODER])
    nodes = {"exported": {str(component): files.node_count(model) for component, model in models.items()}}
    for name, transform in progress.track(list(PASSES.items()), "passes"):
        if config.optimize.passes.get(name, True):
            for group in groups:
                transform(group)
            nodes[name] = {str(component): files.node_count(model) for component, model in models.items()}
    for component, model in progress.track(list(models.items()), "writing"):
        files.save(model, out / f"{component}.onnx")
        progress.note(
            f"{component}: {nodes['exported'][str(component)]} nodes exported, {files.node_count(model)} left"
        )
    return {"nodes": nodes}


STAGE = Stage(
    name="optimize",
    run=run,
    inputs=takes("export"),
    sections=("optimize",),
    packages=("onnx", "onnx-ir", "onnxscript"),
)
