"""What opening a deployable imports, and what building one: what each needs, and no more."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Build

WATCHED = [
    *("onnx", "onnx_ir", "onnxscript", "hydra", "matplotlib", "rich", "accel.graph", "accel.stages", "accel.pipeline"),
    *("accel.engine.executor", "accel.engine.planning", "accel.engine.step"),
]
ENGINE = ["accel.engine.executor", "accel.engine.planning", "accel.engine.step"]
PROGRAM = """
import sys, torch, accel
accel.load
before = [name for name in {watched} if name in sys.modules]
with accel.load({folder!r}, "cpu", static={static}, engine={engine!r}) as model:
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)
print(before, [name for name in {watched} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("static", "engine", "expected"),
    [
        (False, "onnxruntime", []),
        (True, "onnxruntime", ["onnx"]),  # reads where the graphs' shared weights are
        (True, "fused", ["onnx", "onnx_ir", *ENGINE]),
    ],
    ids=["dynamic", "static", "fused"],
)
def test_opening_a_deployable(static: bool, engine: str, expected: list[str], build: Build, tiny: Path) -> None:
    folder = build(tiny, "verify", ("runtime.static=true",))[1]["verify"].folder
    program = PROGRAM.format(watched=WATCHED, folder=str(folder), static=static, engine=engine)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {expected}"


def test_building_imports_no_plots() -> None:
    """Neither do the stages when they are imported, nor the certificate when it is drawn, for seaborn and pandas."""
    program = """
import sys
from accel.stages import export, merge, optimize, reference, verify
print("matplotlib" in sys.modules)
from accel.reporting import svg_plots
print("matplotlib" in sys.modules, [name for name in ("seaborn", "pandas", "matplotlib.pyplot") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "True []"]
