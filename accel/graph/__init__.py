"""Rewriting of ONNX graphs with onnx_ir. Knows neither torch nor Hydra."""
