"""Run static decode graphs in torch, without ONNX Runtime.

`executor` runs a graph node by node, each by the function that `operators` has for its operator. It is what runs the
nodes that no fused operation takes: right in FP32, FP16 and BF16, on CPU and CUDA, and capturable as a CUDA graph where
no shape depends on data. `planning` replaces most nodes of a graph by few fused `operations`, which the executor runs
like nodes.
"""
