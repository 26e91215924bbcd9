"""`export` compares its graphs with PyTorch at shapes other than the traced one, and fails if one is wrong."""

from pathlib import Path

import onnx_ir as ir
import pytest

from accel.adapters import registry
from accel.errors import AccelError
from accel.evaluation.graph_comparison import compare
from accel.graph import files
from accel.models.checkpoints import load_model
from tests.conftest import Build

COMPONENTS = ("encoder", "prefill", "decode")


@pytest.mark.parametrize("damaged", [None, *COMPONENTS])
def test_every_component_is_compared(build: Build, tiny: Path, tmp_path: Path, damaged: str | None) -> None:
    """A weight that is changed by 1% is detected and its component named; unchanged graphs pass."""
    config, artifacts = build(tiny, "export")
    for component in COMPONENTS:
        graph = files.load(artifacts["export"].folder / f"{component}.onnx")
        if component == damaged:
            norm = next(name for name in graph.graph.initializers if name.endswith("final_layer_norm.weight"))
            changed = graph.graph.initializers[norm].const_value.numpy().copy()
            changed[3] *= 1.01
            graph.graph.initializers[norm].const_value = ir.tensor(changed, name=norm)
        files.save(graph, tmp_path / f"{component}.onnx")
    architecture, model = registry.build(config.architecture), load_model(tiny)
    if damaged is None:
        worst = compare(architecture, model, tmp_path, 1e-4, seed=1)
        assert set(worst) == set(COMPONENTS)
        assert all(0 < difference < 1e-4 for difference in worst.values())
    else:
        with pytest.raises(AccelError, match=f"export of {damaged}: .* is off by .*past"):
            compare(architecture, model, tmp_path, 1e-4, seed=1)
