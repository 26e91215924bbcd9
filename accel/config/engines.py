"""Engines, which compute decode steps over static caches."""

ONNXRUNTIME = "onnxruntime"
FUSED = "fused"  # fused operations planned from the static decode graph; what they leave runs in torch
AUTO = "auto"  # the engine that a deployable was verified with, where the device can run it: else `onnxruntime`
INDUCTOR = "inductor"  # PyTorch's compiler: computes a baseline of the benchmark, and is no choice of `runtime.engine`
ENGINES = (ONNXRUNTIME, FUSED, AUTO)  # choices of `runtime.engine`
