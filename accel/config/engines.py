"""Engines, which compute decode steps over static caches."""

ONNXRUNTIME = "onnxruntime"
FUSED = "fused"  # fused operations planned from the static decode graph; what they leave runs in torch
AUTO = "auto"
ENGINES = (ONNXRUNTIME, FUSED, AUTO)  # choices of `runtime.engine`

FASTEST = ONNXRUNTIME  # what `auto` stands for. Where `fused` can't run a model, `onnxruntime` takes its place


def preferred(engine: str) -> str:
    """Return the engine that a choice stands for, where it can run the model."""
    return FASTEST if engine == AUTO else engine
